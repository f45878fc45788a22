"""Measures the error of each backend and dtype against the float64 reference, on a user's flow and images."""

import copy
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from ..backend import DTYPES, Backend, uses_triton
from ..errors import InputError, UnavailableError
from ..models.msflow import MultiScaleFlow
from ..ops.conv3x3 import rounds_to_tf32

# Bounds on the relative errors of z and log scores and on the error of log_det in nats per element: up to eight blocks
# and a fusion amplify each dtype's rounding of stored values, and TF32's products, which GPUs use for float32.
TOLERANCES = {"float32": 1e-4, "tf32": 5e-3, "float16": 1e-2, "bfloat16": 8e-2}
FORMS = {"tanh": "FrEIA 0.2: clamp tanh(r)", "scaled_tanh": "FrEIA's git master: clamp tanh(r / clamp)"}

Batches = Iterable[Sequence[Tensor]]
Progress = Callable[[int], None]


@dataclass
class CheckRow:
    """Errors of one backend and dtype against the reference, the largest over all images."""

    backend: Backend
    dtype: str
    tolerance: float
    z: float = 0.0
    """The largest |dz|."""
    log_det: float = 0.0
    """The largest |dlog_det|, in nats."""
    score: float = 0.0
    """The largest |dscore| of the published image score, which is in [0, 1]."""
    rank_correlation: float = float("nan")
    """Spearman's correlation of the images' log scores; NaN for fewer than two images."""
    relative: float = 0.0
    """The error that ``tolerance`` bounds: the largest of the relative error in the norm of z by level and of the log
    scores, and the error of log_det in nats per element of z (log_det may be near 0, so its relative error means
    little)."""
    seconds: float = 0.0
    """Seconds per image for the flow and its scores, in the second of two runs."""
    log_scores: list[float] = field(default_factory=list)

    @property
    def within(self) -> bool:
        """True if the errors are rounding only; False for NaN."""
        return self.relative <= self.tolerance

    def add(self, outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        """Adds the errors of some images; both arguments hold z per level, log_det, scores and log scores."""
        pairs = [(value.double(), wanted) for value, wanted in zip(outputs, expected, strict=True)]
        *z, log_det, score, _ = ((a - b).abs().max().item() for a, b in pairs)
        *z_norms, _, _, log_score_norm = (((a - b).norm() / b.norm()).item() for a, b in pairs)
        elements = sum(level[0].numel() for level in expected[: len(z)])
        # Unlike Python's, numpy's maximum is NaN if one of the values is.
        self.z, self.log_det = float(np.max([self.z, *z])), float(np.max([self.log_det, log_det]))
        self.score = float(np.max([self.score, score]))
        self.relative = float(np.max([self.relative, *z_norms, log_score_norm, log_det / elements]))
        self.log_scores += outputs[-1].tolist()


@dataclass(frozen=True)
class NumericalCheck:
    """Errors of all backends and dtypes that are available here."""

    formula: str
    device: str
    images: int
    rows: list[CheckRow]
    unavailable: dict[str, str]
    """Backends that are not available here, and the reason."""

    @property
    def within(self) -> bool:
        return all(row.within for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Returns JSON-able values, with None for NaN."""
        rows = [asdict(row) | {"within": row.within} for row in self.rows]
        content = json.dumps({**asdict(self), "within": self.within, "rows": rows})
        return json.loads(content, parse_constant=lambda nan: None)


@torch.no_grad()
def check_numerics(
    flow: MultiScaleFlow, batches: Batches, image_size: tuple[int, int], progress: Progress = lambda done: None
) -> NumericalCheck:
    """Runs ``flow`` in every backend and dtype that their device supports, and in float64 with plain PyTorch.

    ``batches``: pooled features, (B, C_l, H_l, W_l) per level. ``image_size``: (H, W) of the score maps.
    Raises: InputError if there is no image.
    """
    flow = copy.deepcopy(flow).eval().requires_grad_(False)
    reference = _converted(flow, torch.float64, "torch")
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise InputError("no image to compare on; give some that can be read")
    rows, unavailable = _candidates(first[0])
    flows = [_converted(flow, getattr(torch, row.dtype), row.backend) for row in rows]
    log_scores: list[float] = []
    for levels in chain([first], batches):
        expected = _outputs(reference, levels, image_size)
        log_scores += expected[-1].tolist()
        for row, candidate in zip(rows, flows, strict=True):
            row.add(_outputs(candidate, levels, image_size), expected)
            row.seconds += _seconds(candidate, levels, image_size)
        progress(len(log_scores))
    for row in rows:
        row.seconds /= len(log_scores)
        if len(log_scores) > 1:
            row.rank_correlation = float(spearmanr(log_scores, row.log_scores).statistic)
    return NumericalCheck(FORMS[flow.clamp_form], _name(first[0].device), len(log_scores), rows, unavailable)


def noise(flow: MultiScaleFlow, image_size: tuple[int, int], images: int) -> Batches:
    """Yields standard normal noise in place of features, on grids of strides 8, 16, 32 ..., two images at once."""
    generator = torch.Generator().manual_seed(0)
    device = next(flow.parameters()).device
    grids = [[max(1, side // (8 << level)) for side in image_size] for level in range(len(flow.channels))]
    for start in range(0, images, 2):
        yield [
            torch.randn(min(2, images - start), c, *grid, generator=generator).to(device)
            for c, grid in zip(flow.channels, grids, strict=True)
        ]


def _candidates(x: Tensor) -> tuple[list[CheckRow], dict[str, str]]:
    try:
        uses_triton("triton", x)
        backends: tuple[Backend, ...] = ("torch", "triton")
        unavailable = {}
    except UnavailableError as error:
        backends = ("torch",)
        unavailable = {"triton": str(error)}
    tf32 = x.is_cuda and rounds_to_tf32()
    names = [str(dtype).removeprefix("torch.") for dtype in reversed(DTYPES)]
    limit = {name: TOLERANCES["tf32" if tf32 and name == "float32" else name] for name in names}
    return [CheckRow(backend, name, limit[name]) for backend in backends for name in names], unavailable


def _converted(flow: MultiScaleFlow, dtype: torch.dtype, backend: Backend) -> MultiScaleFlow:
    result = copy.deepcopy(flow).to(dtype).to(memory_format=torch.channels_last)
    result.backend = backend
    return result


def _outputs(flow: MultiScaleFlow, levels: Sequence[Tensor], image_size: tuple[int, int]) -> list[Tensor]:
    """Returns z per level, log_det, scores and log scores."""
    x = _inputs(flow, levels)
    z, log_det = flow(x)
    scores = flow.scores(x, image_size)
    return [*z, log_det, scores.score, scores.log_score]


def _seconds(flow: MultiScaleFlow, levels: Sequence[Tensor], image_size: tuple[int, int]) -> float:
    """Returns the seconds that the flow and its scores take."""
    x = _inputs(flow, levels)
    _wait(x[0])
    started = time.perf_counter()
    flow.scores(x, image_size)
    _wait(x[0])
    return time.perf_counter() - started


def _inputs(flow: MultiScaleFlow, levels: Sequence[Tensor]) -> list[Tensor]:
    return [level.to(flow.dtype, memory_format=torch.channels_last) for level in levels]


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
