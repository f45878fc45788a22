"""Training and evaluation on Lightning. Needs the ``train`` extra."""

from .evaluation import Evaluation
from .fit import Outcome, train
from .plan import Reading
from .recipe import Recipe
from .run_state import RunState, load_state
from .testing import evaluate

__all__ = ["Evaluation", "Outcome", "Reading", "Recipe", "RunState", "evaluate", "load_state", "train"]
