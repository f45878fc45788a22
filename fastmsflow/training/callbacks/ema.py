"""An exponential moving average of the flow's weights, in use wherever they are judged or saved."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ...models.msflow import MultiScaleFlow


class EMACallback(Callback):
    """``average = decay average + (1 - decay) weights`` after each step, from the first step's weights on.

    Not Lightning's own callback: that averages the frozen extractor and the permutations as well, and takes the average
    back before a round's checkpoints are written.
    """

    state_key = "Averaging"
    """The key of its state in a run's state file: the class's name when the first of these were written."""

    def __init__(self, flow: MultiScaleFlow, decay: float) -> None:
        self._flow = flow
        self._average_of_weights = get_ema_multi_avg_fn(decay)
        self._average: AveragedModel | None = None
        self._kept: dict[str, Any] = {}
        self._steps = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning has moved the flow to its device by now, and read the state.
        self._average = AveragedModel(self._flow, multi_avg_fn=self._average_of_weights)
        if self._kept:
            self._average.load_state_dict(self._kept)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._steps = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            self._there.update_parameters(self._flow)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """In the block the flow has the average for its weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Any]:
        return self._there.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._kept = state_dict

    @property
    def _there(self) -> AveragedModel:
        if self._average is None:
            raise RuntimeError("the average begins with a training")
        return self._average

    @torch.no_grad()
    def _swap(self) -> None:
        for own, average in zip(self._flow.parameters(), self._there.module.parameters(), strict=True):
            kept = own.clone()
            # Not through .data: what is kept of the weights has to notice.
            own.copy_(average)
            average.copy_(kept)
