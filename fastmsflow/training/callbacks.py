"""What happens beside the training: its state is kept, its progress is shown."""

import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, Checkpoint
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn

from ..files import written_aside
from .recipe import Recipe

SAVE_SECONDS = 60.0


class StateFile(Checkpoint):
    """All that a run needs to go on as if it had never stopped, in one file: after each round, and after an epoch where
    the last time is SAVE_SECONDS ago. Not after the last epoch, whose results follow at once."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self._path = path
        self._recipe = recipe
        self._saved = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved = time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning resumes exactly from a state of this moment, not from one of an epoch's start.
        epoch = trainer.current_epoch + 1
        over = epoch == self._recipe.epochs or trainer.should_stop
        due = epoch % self._recipe.sub_epochs == 0 or time.monotonic() - self._saved > SAVE_SECONDS
        if due and not over:
            with written_aside(self._path) as aside:
                trainer.save_checkpoint(aside)
            self._saved = time.monotonic()


class TrainingBar(Callback):
    """Steps of the whole training, with the time that is left."""

    def __init__(self, console: Console) -> None:
        self._progress = progress(console)
        self._task = self._progress.add_task("training")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        steps = int(trainer.estimated_stepping_batches)
        self._progress.reset(self._task, total=steps, completed=trainer.global_step)
        self._progress.start()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._progress.update(self._task, completed=trainer.global_step)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._progress.update(self._task, description="evaluating")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._progress.update(self._task, description="training")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._progress.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._progress.stop()


def progress(console: Console) -> Progress:
    """A bar with the time that is left and the time that has passed, on a terminal; nothing elsewhere."""
    columns = (*Progress.get_default_columns()[:-1], TimeRemainingColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
