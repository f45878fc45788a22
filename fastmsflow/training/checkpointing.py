"""A run's state is kept, so that it can go on when it was killed or its machine is taken away."""

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
from .callbacks.preemption import KEPT, LAST_KEPT, PreemptionHandler

SAVE_SECONDS = 60.0
# Before an evaluation, in which a pre-empted run cannot save.
SAVE_BEFORE_SECONDS = 10.0
# Several processes agree on saving and stopping every so many steps of the optimizer.
AGREE_EVERY = 10


class ResumeCheckpoint(Checkpoint):
    """All that a run needs to go on as if it had never stopped, in one file: after each round, after any step where the
    last time is SAVE_SECONDS ago, and when SIGTERM comes. Not after the last epoch, whose results follow at once.

    Errors: Preempted, when SIGTERM has come; during an evaluation at once, without saving.
    """

    def __init__(self, path: Path, recipe: Recipe, world: ProcessGroup, preemption: PreemptionHandler) -> None:
        self._path = path
        self._recipe = recipe
        self._world = world
        self._preemption = preemption
        self._saved = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved = time.monotonic()
        # Lightning has put its own there, which talks to the other processes from within a signal handler.
        self._preemption.install()
        self._preemption.deferred = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        each = trainer.accumulate_grad_batches
        left = int(trainer.num_training_batches) - 1 - batch_idx
        # Lightning cannot go on from a state of an epoch's last step before its evaluation; of half a step neither.
        if not left or (batch_idx + 1) % each:
            return
        # No whole step comes between this one and the epoch's last batch.
        evaluates = left <= each and (trainer.current_epoch + 1) % self._recipe.sub_epochs == 0
        if self._world.size == 1 or (batch_idx + 1) // each % AGREE_EVERY == 0 or evaluates:
            self._save(trainer, self._ago > (SAVE_BEFORE_SECONDS if evaluates else SAVE_SECONDS))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning resumes exactly from a state of this moment, not from one of an epoch's start.
        epoch = trainer.current_epoch + 1
        if epoch < self._recipe.epochs and not trainer.should_stop:
            self._save(trainer, epoch % self._recipe.sub_epochs == 0 or self._ago > SAVE_SECONDS)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._preemption.deferred = False
        if self._preemption.asked:
            raise Preempted(LAST_KEPT)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._preemption.deferred = True

    @property
    def _ago(self) -> float:
        return time.monotonic() - self._saved

    def _save(self, trainer: L.Trainer, due: bool) -> None:
        # When, the first process's clock says.
        due, asked = self._world.all_reduce_any(due and self._world.first, self._preemption.asked)
        if due or asked:
            with written_aside(self._path) if self._world.first else nullcontext(self._path) as aside:
                trainer.save_checkpoint(aside)
            self._saved = time.monotonic()
        if asked:
            raise Preempted(KEPT)
