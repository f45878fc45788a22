"""Keeps an exponential moving average of the flow's weights, used wherever the model is evaluated or saved."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ...models.msflow import MultiScaleFlow


class EMACallback(Callback):
    """Computes ``average = decay average + (1 - decay) weights`` after each step, from the first step's weights on.

    Lightning's own callback averages the frozen extractor too, swaps weights through ``.data``, which the weight caches
    do not notice, and takes the average back before a round's checkpoints are written.
    """

    def __init__(self, flow: MultiScaleFlow, decay: float) -> None:
        self._flow = flow
        self._average_fn = get_ema_multi_avg_fn(decay)
        self._average: AveragedModel
        """Set where a training begins."""
        self._saved_state: dict[str, Any] = {}
        self._steps = 0

    @property
    def state_key(self) -> str:
        """The key of this callback's state in ``state.ckpt``: the name that the class had in version 0.1."""
        return "Averaging"

    def on_fit_start(self, *_: Any) -> None:
        # Lightning has moved the flow to its device by now, and loaded the state.
        self._average = AveragedModel(self._flow, multi_avg_fn=self._average_fn)
        if self._saved_state:
            self._average.load_state_dict(self._saved_state)

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._steps = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            self._average.update_parameters(self._flow)

    def on_validation_start(self, *_: Any) -> None:
        self._swap()

    def on_validation_end(self, *_: Any) -> None:
        self._swap()

    def on_train_end(self, *_: Any) -> None:
        self._swap()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Gives the flow the average as its weights within the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Any]:
        return self._average.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved_state = state_dict

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, average in zip(self._flow.parameters(), self._average.module.parameters(), strict=True):
            previous = weight.clone()
            # In place, but not through .data: weight caches watch the version counter.
            weight.copy_(average)
            average.copy_(previous)
