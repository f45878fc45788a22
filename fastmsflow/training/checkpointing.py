"""Saves a run's state, from which the run is resumed after it was killed or its machine was taken away.

To resume, ``run_directory.py`` finds the state, and ``trainer.py`` gives it to Lightning.
"""

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from ..distributed.process_group import ProcessGroup
from ..errors import Preempted
from ..files import written_aside
from ..recipe import Recipe
from .callbacks.preemption import RESUME_FROM_LAST, STATE_SAVED, PreemptionHandler

SAVE_SECONDS = 60.0
# Before an evaluation, in which a pre-empted run cannot save.
SAVE_BEFORE_SECONDS = 10.0
# Steps of the optimizer after which several processes agree on saving and stopping.
AGREE_EVERY = 10


class ResumeCheckpoint(Checkpoint):
    """Saves everything that a run needs to continue as if it had never stopped, in one file.

    The state is saved after each round, after a step if the last save is SAVE_SECONDS ago, and when SIGTERM arrives;
    not after the last epoch, whose results follow at once.

    Raises: Preempted after SIGTERM; during an evaluation at once, without saving.
    """

    def __init__(self, path: Path, recipe: Recipe, world: ProcessGroup, preemption: PreemptionHandler) -> None:
        self._path = path
        self._recipe = recipe
        self._world = world
        self._preemption = preemption
        self._saved = 0.0

    def on_train_start(self, *_: Any) -> None:
        self._saved = time.monotonic()
        # Lightning has installed its own handler, which talks to the other processes from within a signal handler.
        self._preemption.install()
        self._preemption.deferred = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        batches_per_step = trainer.accumulate_grad_batches
        left = int(trainer.num_training_batches) - 1 - batch_idx
        # Lightning cannot resume from an epoch's last step before its evaluation, nor from the middle of a step.
        if not left or (batch_idx + 1) % batches_per_step:
            return
        # No whole step comes between this one and the epoch's last batch.
        evaluates = left <= batches_per_step and (trainer.current_epoch + 1) % self._recipe.sub_epochs == 0
        if self._world.size == 1 or (batch_idx + 1) // batches_per_step % AGREE_EVERY == 0 or evaluates:
            self._save(trainer, self._seconds_ago > (SAVE_BEFORE_SECONDS if evaluates else SAVE_SECONDS))

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        # Lightning resumes exactly from an epoch's end, not from an epoch's start.
        epoch = trainer.current_epoch + 1
        if epoch < self._recipe.epochs and not trainer.should_stop:
            self._save(trainer, epoch % self._recipe.sub_epochs == 0 or self._seconds_ago > SAVE_SECONDS)

    def on_validation_start(self, *_: Any) -> None:
        self._preemption.deferred = False
        if self._preemption.asked:
            raise Preempted(RESUME_FROM_LAST)

    def on_validation_end(self, *_: Any) -> None:
        self._preemption.deferred = True

    @property
    def _seconds_ago(self) -> float:
        return time.monotonic() - self._saved

    def _save(self, trainer: L.Trainer, due: bool) -> None:
        # The first process's clock decides.
        due, asked = self._world.all_reduce_any(due and self._world.first, self._preemption.asked)
        if due or asked:
            with written_aside(self._path) if self._world.first else nullcontext(self._path) as aside:
                trainer.save_checkpoint(aside)
            self._saved = time.monotonic()
        if asked:
            raise Preempted(STATE_SAVED)
