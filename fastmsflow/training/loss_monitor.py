"""Averages the losses of an epoch over all processes, and finds a loss or gradient that is not finite."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributed.process_group import ErrorOnAnotherRank, ProcessGroup
from ..errors import InputError


class NotFinite(InputError):
    """Raised when a loss or a gradient is not finite; ``record`` names the step and the batch's images."""

    def __init__(self, message: str, record: dict[str, Any]) -> None:
        super().__init__(message)
        self.record = record


class LossMonitor:
    """Collects the losses of steps on the device; ``check`` copies them to the CPU, and waits for the other processes.

    ``scaled``: gradients are scaled for float16, so that some are expected to overflow.
    """

    def __init__(self, world: ProcessGroup, scaled: bool) -> None:
        self.steps = 0
        """Steps of this epoch so far."""
        self._world = world
        self._scaled = scaled
        self._total = 0.0
        self._losses: list[Tensor] = []
        self._numbers: list[list[int]] = []
        self._norms: dict[int, Tensor] = {}

    def add(self, loss: Tensor, share: float, numbers: list[int]) -> None:
        """Adds the loss of a step on the images of ``numbers``; ``share``: its weight among the processes."""
        self._losses.append(loss.detach() * share)
        self._numbers.append(numbers)
        self.steps += 1

    def add_gradient_norm(self, norm: Tensor) -> None:
        """Adds the gradient norm of the step whose loss was added last."""
        if not self._scaled:
            self._norms[len(self._losses) - 1] = norm

    def check(self, epoch: int, names: Sequence[str]) -> None:
        """Checks that the losses and gradient norms since the last check are finite; all processes call this.

        ``names``: the images' names, by number.
        Raises: NotFinite in the process of the first value that is not finite, ErrorOnAnotherRank in the others.
        """
        fault = None
        if self._losses:
            norms = [self._norms.get(i, torch.zeros_like(loss)) for i, loss in enumerate(self._losses)]
            values = torch.stack([torch.stack(self._losses), torch.stack(norms).to(self._losses[0].dtype)]).cpu()
            finite = values.isfinite().all(dim=0)
            if not finite.all():
                i = int(finite.logical_not().nonzero()[0])
                what = "gradient" if values[0, i].isfinite() else "loss"
                step, value = self.steps - len(self._losses) + i + 1, values[int(what == "gradient"), i].item()
                # The names are read before the other processes end: a shard may have to be read for them.
                images = [names[number] for number in self._numbers[i]]
                record = {"epoch": epoch + 1, "step": step, "what": what, "value": str(value), "images": images}
                fault = NotFinite(
                    f"the {what} is {value} in epoch {epoch + 1}, step {step}, of the images {', '.join(images)}; look"
                    " at them, or try a lower learning rate or 32-true",
                    record,
                )
            for value in values[0].tolist():
                # One by one, in float64, so that the sum does not depend on when the losses were checked.
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
        """Returns the mean loss of the epoch, after a last ``check``, and begins the next epoch."""
        mean = sum(self._world.all_gather(self._total)) / self._world.size / self.steps
        self._total, self.steps = 0.0, 0
        return mean

    def state(self) -> dict[str, Any]:
        """Returns the state that ``load`` takes, after ``check``; all processes call this."""
        return {"steps": self.steps, "totals": list(self._world.all_gather(self._total))}

    def load(self, state: dict[str, Any]) -> None:
        """Continues from ``state``. Raises: InputError if the state has another form."""
        totals = state.get("totals", ())
        if len(totals) != self._world.size:
            raise InputError("the run's state is of another version of fastmsflow; remove it to begin the run again")
        self.steps = state["steps"]
        self._total = totals[self._world.rank]
