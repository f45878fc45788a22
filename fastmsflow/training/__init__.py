"""Training and evaluation on Lightning. Needs the ``train`` extra."""

from ..evaluation.evaluate import evaluate
from ..evaluation.results import Evaluation
from ..recipe import DataConfig, Recipe
from .read_run_state import RunState, load_state
from .train import train
from .training_result import TrainingResult

# The names in version 0.1.
Outcome = TrainingResult
Reading = DataConfig

__all__ = ["DataConfig", "Evaluation", "Recipe", "RunState", "TrainingResult", "evaluate", "load_state", "train"]
