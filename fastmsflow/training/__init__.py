"""Training and evaluation on Lightning. Needs the ``train`` extra."""

from .evaluation import Evaluation
from .fit import Outcome, train
from .plan import Reading
from .recipe import Recipe
from .testing import evaluate

__all__ = ["Evaluation", "Outcome", "Reading", "Recipe", "evaluate", "train"]
