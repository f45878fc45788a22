"""Shows the progress of a training on a terminal."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from ...progress import progress
from .throughput import ThroughputCallback


class TrainingProgressBar(Callback):
    """Shows the steps of the whole training, the time left, and the speed that a ThroughputCallback measures."""

    def __init__(self, console: Console) -> None:
        self._progress = progress(console)
        self._task = self._progress.add_task("training")

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        steps = int(trainer.estimated_stepping_batches)
        self._progress.reset(self._task, total=steps, completed=trainer.global_step)
        self._progress.start()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        line = next((callback.line for callback in trainer.callbacks if isinstance(callback, ThroughputCallback)), "")
        description = f"training, {line}" if line else "training"
        self._progress.update(self._task, completed=trainer.global_step, description=description)

    def on_validation_start(self, *_: Any) -> None:
        self._progress.update(self._task, description="evaluating")

    def on_validation_end(self, *_: Any) -> None:
        self._progress.update(self._task, description="training")

    def on_train_end(self, *_: Any) -> None:
        self._progress.stop()

    def on_exception(self, *_: Any) -> None:
        self._progress.stop()
