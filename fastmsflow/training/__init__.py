"""Training and evaluation on Lightning. Needs the ``train`` extra."""

from .evaluation import Evaluation
from .fit import Outcome, train
from .recipe import Recipe
from .testing import evaluate

__all__ = ["Evaluation", "Outcome", "Recipe", "evaluate", "train"]
