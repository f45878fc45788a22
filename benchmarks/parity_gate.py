"""Every timed row carries its gate: how far the contestant's numbers are from the reference, at the timed shapes.

The reference is the model in plain PyTorch, eager, float32, TF32 off. A row whose gate is red is timed and never
published.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.contestants import CLIP, Contestant
from benchmarks.suite_settings import DEVICE
from fastmsflow import MSFlow, backend
from tests.helpers.tolerances import CONTESTANT, PREDICTION

T = TypeVar("T")


@dataclass(frozen=True)
class Gate:
    """Relative errors, in the norm, and what each of them is allowed."""

    errors: dict[str, float]
    bound: float

    @property
    def green(self) -> bool:
        """Returns whether every error is below the bound; NaN is not."""
        return all(error < self.bound for error in self.errors.values())

    def require(self) -> None:
        """Checks the gate at the end of a row, after the timing. Raises: AssertionError that names what is off."""
        assert self.green, f"red: {self.errors}, at most {self.bound} is allowed"

    def as_dict(self) -> dict[str, Any]:
        return {"green": self.green, "bound": self.bound, "errors": self.errors}


class Reference:
    """Holds the model's own numbers, computed once for a batch and kept on the CPU, where they take no GPU memory.

    Features and images are the same for all contestants.
    """

    def __init__(self, model: MSFlow) -> None:
        self.model = model
        self._cached: dict[tuple[str, int], Any] = {}

    def likelihoods(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Log-likelihood maps and log-det of pooled features."""

        def compute() -> list[Tensor]:
            maps, log_det = self.model.flow.log_likelihood_maps(features)
            return [x.cpu() for x in (*maps, log_det)]

        with torch.no_grad():
            return self._once("likelihoods", len(features[0]), compute)

    def step(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Loss and gradient norm of a training's first step on pooled features."""
        return self._once("step", len(features[0]), lambda: self._first_step(features))

    def image_step(self, images: Tensor) -> list[Tensor]:
        """Loss and gradient norm of a training's first step on images."""

        def compute() -> list[Tensor]:
            with torch.no_grad():
                features = self.model.features(images)
            return self._first_step(features)

        return self._once("image step", len(images), compute)

    def prediction(self, images: Tensor) -> list[Tensor]:
        """Log score and multiplicative map of images."""

        def compute() -> list[Tensor]:
            found = self.model.scores(images)
            return [found.log_score.cpu(), found.score_map_mul.cpu()]

        with torch.no_grad():
            return self._once("prediction", len(images), compute)

    def _first_step(self, features: Sequence[Tensor]) -> list[Tensor]:
        flow = copy.deepcopy(self.model.flow).requires_grad_(True)
        loss = flow.nll(features).mean()
        loss.backward()
        return [loss.detach().cpu(), nn.utils.clip_grad_norm_(flow.parameters(), CLIP).cpu()]

    def _once(self, what: str, batch: int, compute: Callable[[], T]) -> T:
        if (what, batch) not in self._cached:
            with exact():
                self._cached[what, batch] = compute()
        return self._cached[what, batch]


@contextmanager
def exact() -> Iterator[None]:
    """Plain PyTorch, its float32 convolutions and products not rounded to TF32."""
    products = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), backend.use("torch"):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = products


def flow_gate(contestant: Contestant, reference: Reference, features: Sequence[Tensor]) -> Gate:
    """``features``: pooled, float32."""
    given = [contestant.adapt(level) for level in features]
    # More than once: later calls may take another way.
    for _ in range(3):
        maps, log_det = contestant.likelihoods(given)
    names = [*(f"log-likelihood, level {level}" for level in range(len(maps))), "log-det"]
    return _gate(contestant, names, [*maps, log_det], reference.likelihoods(features), CONTESTANT)


def step_gate(contestant: Contestant, reference: Reference, features: Sequence[Tensor]) -> Gate:
    """``features``: pooled, float32. The contestant has taken a step then."""
    expected = reference.step(features)
    ours = contestant.step([contestant.adapt_training(level) for level in features])
    return _gate(contestant, ["first loss", "first gradient norm"], ours, expected, CONTESTANT)


def image_step_gate(contestant: Contestant, reference: Reference, images: Tensor) -> Gate:
    expected = reference.image_step(images)
    names = ["first loss", "first gradient norm"]
    return _gate(contestant, names, contestant.image_step(images), expected, PREDICTION)


def prediction_gate(contestant: Contestant, reference: Reference, images: Tensor) -> Gate:
    for _ in range(3):
        _, log_score, _, score_map_mul, _ = contestant.predict(images)
    return _gate(contestant, ["log score", "map"], [log_score, score_map_mul], reference.prediction(images), PREDICTION)


def _gate(
    contestant: Contestant,
    names: Sequence[str],
    ours: Sequence[Tensor],
    expected: Sequence[Tensor],
    bounds: dict[str, float],
) -> Gate:
    errors = {name: error(*pair) for name, *pair in zip(names, ours, expected, strict=True)}
    if DEVICE.type == "cuda" or contestant.gpu_only:
        return Gate(errors, bounds[contestant.name])
    return Gate(errors, bounds["cpu" if contestant.precision == "float32" else f"cpu, {contestant.precision}"])


def error(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|, in the norm."""
    theirs = theirs.to(ours.device).double()
    return ((ours.double() - theirs).norm() / theirs.norm()).item()
