"""Training and evaluation on Lightning. Needs the ``train`` extra."""

from ..evaluation.evaluate import evaluate
from ..evaluation.results import Evaluation
from ..recipe import DataConfig, Recipe
from .resume_state import RunState, load_state
from .train import train
from .training_result import TrainingResult

__all__ = ["DataConfig", "Evaluation", "Recipe", "RunState", "TrainingResult", "evaluate", "load_state", "train"]
