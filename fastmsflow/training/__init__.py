"""Training and evaluation on Lightning. Needs the ``train`` extra."""

from .evaluation import Evaluation, evaluate
from .fit import Outcome, train
from .recipe import Recipe

__all__ = ["Evaluation", "Outcome", "Recipe", "evaluate", "train"]
