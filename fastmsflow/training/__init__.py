"""Training and evaluation on Lightning. Needs the ``train`` extra."""

from ..evaluation.evaluate import evaluate
from ..evaluation.results import Evaluation
from .data_config import Reading
from .recipe import Recipe
from .resume_state import RunState, load_state
from .train import Outcome, train

__all__ = ["Evaluation", "Outcome", "Reading", "Recipe", "RunState", "evaluate", "load_state", "train"]
