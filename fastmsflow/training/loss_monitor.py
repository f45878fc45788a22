"""The losses of an epoch: their mean over all processes, and the one that is not finite."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributed.process_group import ErrorOnAnotherRank, ProcessGroup
from ..errors import InputError


class NotFinite(InputError):
    """A loss or a gradient is not finite; ``record`` says where, with the batch's images."""

    def __init__(self, message: str, record: dict[str, Any]) -> None:
        super().__init__(message)
        self.record = record


class LossMonitor:
    """Collects the losses of steps; ``look`` takes them off the device, which waits for it and for other processes.

    ``scaled``: gradients are scaled for float16, and those of some steps are meant to overflow.
    """

    def __init__(self, world: ProcessGroup, scaled: bool) -> None:
        self.steps = 0
        """Of this epoch."""
        self._world = world
        self._scaled = scaled
        self._total = 0.0
        self._losses: list[Tensor] = []
        self._numbers: list[list[int]] = []
        self._norms: dict[int, Tensor] = {}

    def add(self, loss: Tensor, share: float, numbers: list[int]) -> None:
        """Of a step; ``share``: see Part."""
        self._losses.append(loss.detach() * share)
        self._numbers.append(numbers)
        self.steps += 1

    def add_gradient_norm(self, norm: Tensor) -> None:
        """Of the same step."""
        if not self._scaled:
            self._norms[len(self._losses) - 1] = norm

    def look(self, epoch: int, names: Sequence[str]) -> None:
        """To be called by all processes. ``names``: of the images, by number. Errors: NotFinite, in the process where
        the first of them is; ErrorOnAnotherRank in the others."""
        fault = None
        if self._losses:
            norms = [self._norms.get(i, torch.zeros_like(loss)) for i, loss in enumerate(self._losses)]
            values = torch.stack([torch.stack(self._losses), torch.stack(norms).to(self._losses[0].dtype)]).cpu()
            finite = values.isfinite().all(dim=0)
            if not finite.all():
                i = int(finite.logical_not().nonzero()[0])
                what = "gradient" if values[0, i].isfinite() else "loss"
                step, value = self.steps - len(self._losses) + i + 1, values[int(what == "gradient"), i].item()
                # Before the others know and end: a shard may have to be read for a name.
                fault = self._not_finite(epoch, step, what, value, [names[number] for number in self._numbers[i]])
            for value in values[0].tolist():
                # One by one, in float64: the sum does not depend on when it was looked at.
                self._total += value
        steps = self._world.all_gather(None if fault is None else fault.record["step"])
        faults = [(step, rank) for rank, step in enumerate(steps) if step is not None]
        if faults and fault is not None and min(faults)[1] == self._world.rank:
            raise fault
        if faults:
            raise ErrorOnAnotherRank("a loss is not finite")
        self._losses.clear()
        self._numbers.clear()
        self._norms.clear()

    def mean(self) -> float:
        """Of the epoch's steps, after a last look; the next epoch begins."""
        total = sum(self._world.all_gather(self._total))
        mean = total / self._world.size / self.steps
        self._total, self.steps = 0.0, 0
        return mean

    def state(self) -> dict[str, Any]:
        """After a look, on all processes: what ``load`` takes on all of them."""
        return {"steps": self.steps, "totals": list(self._world.all_gather(self._total))}

    def load(self, state: dict[str, Any]) -> None:
        """Errors: InputError where it is no such state."""
        totals = state.get("totals", ())
        if len(totals) != self._world.size:
            raise InputError("the run's state is of another version of fastmsflow; remove it to begin the run again")
        self.steps = state["steps"]
        self._total = totals[self._world.rank]

    @staticmethod
    def _not_finite(epoch: int, step: int, what: str, value: float, names: list[str]) -> NotFinite:
        record = {"epoch": epoch + 1, "step": step, "what": what, "value": str(value), "images": names}
        return NotFinite(
            f"the {what} is {value} in epoch {epoch + 1}, step {step}, of the images {', '.join(names)}; look at them,"
            " or try a lower learning rate or 32-true",
            record,
        )
