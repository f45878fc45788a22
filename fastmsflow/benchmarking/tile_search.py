"""Times a short list of tiles for every kernel, then the kernels' own convolution against the vendor's, by shape."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError
from triton.testing import do_bench

from ..errors import InputError
from ..files import written_aside
from ..kernels import configs
from ..kernels.launch import ProductTile, Tile
from ..ops.conv3x3 import conv3x3, convolution_gradients
from ..ops.conv3x3_coupling import conv3x3_coupling
from ..ops.conv3x3_layer_norm import conv3x3_layer_norm_relu
from ..reference.coupling_spec import CouplingSpec, GlobalAffine
from .launcher_cases import CLAMP, CONDITION, LEVELS, KernelCase, kernel_cases, new, tensors

Timer = Callable[[Callable[[], object]], float]
# A tile must be this much faster than the one it replaces: less is noise.
LEAST_SPEEDUP = 1.02
# Largest difference, relative to the largest value, between what two tiles compute: another order of the same sums,
# then bfloat16's rounding.
AGREEMENT = 2e-2


@dataclass(frozen=True, kw_only=True)
class TileChoice:
    """Reports a kernel's tile before and after, and the speedup (geometric mean over its shapes)."""

    kernel: str
    before: Tile | ProductTile
    after: Tile | ProductTile
    speedup: float


@dataclass(frozen=True, kw_only=True)
class ConvolutionTiming:
    """Reports milliseconds of a convolution by the kernels and by the vendor, with what surrounds it, at one shape."""

    kind: str
    """One of fastmsflow.kernels.configs.KINDS."""
    pixels: int
    outputs: int
    own: float
    vendor: float


def time_call(call: Callable[[], object]) -> float:
    """Returns the median milliseconds of ``call`` on the current GPU."""
    return float(do_bench(call, warmup=10, rep=50, return_mode="median"))


def tune(
    device: torch.device,
    *,
    timer: Timer = time_call,
    levels: Sequence[tuple[int, int]] = LEVELS,
    batches: Sequence[int] = (1, 8, 32),
    image_size: int = 512,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Iterator[TileChoice | ConvolutionTiming]:
    """Yields what was found, and puts it into the process's table (fastmsflow.kernels.configs) as it goes.

    Tiles are timed in bfloat16 at the middle of ``batches``, and serve float32 too.
    ``timer`` returns the milliseconds of a call. ``progress`` gets what is measured, how many measurements are done and
    of how many.
    """
    chip = configs.chip(device)
    by_kernel: dict[str, list[KernelCase]] = {}
    for case in kernel_cases(levels, sorted(batches)[len(batches) // 2], image_size, device):
        by_kernel.setdefault(case.tiles, []).append(case)
    shapes = [(kind, level, batch) for kind in configs.KINDS for level in levels for batch in batches]
    total = len(by_kernel) + len(shapes)
    for done, (kernel, cases) in enumerate(by_kernel.items()):
        progress(kernel, done, total)
        yield _choose_tile(kernel, _one_per_shape(cases), device, timer)
    configs.CONVOLUTIONS[chip] = {kind: [] for kind in configs.KINDS}
    found: dict[str, list[tuple[int, int, bool]]] = {kind: [] for kind in configs.KINDS}
    for done, (kind, (channels, size), batch) in enumerate(shapes, len(by_kernel)):
        progress(f"{kind}, {channels} channels, batch {batch}", done, total)
        own, vendor = _time_both(kind, operation(kind, channels, size, device, batch=batch), device, timer)
        outputs = channels // 2 + CONDITION if kind == "conv3x3_layer_norm" else channels
        timing = ConvolutionTiming(kind=kind, pixels=batch * size**2, outputs=outputs, own=own, vendor=vendor)
        found[kind].append((timing.pixels, outputs, own < vendor))
        yield timing
    configs.CONVOLUTIONS[chip] = found


def as_table(chip: str, results: Sequence[TileChoice | ConvolutionTiming]) -> dict[str, Any]:
    """Makes the user's table of ``chip``, as fastmsflow.kernels.configs.read_user_table reads it."""
    convolutions: dict[str, list[tuple[int, int, bool]]] = {}
    for r in results:
        if isinstance(r, ConvolutionTiming):
            convolutions.setdefault(r.kind, []).append((r.pixels, r.outputs, r.own < r.vendor))
    tiles = {r.kernel: asdict(r.after) for r in results if isinstance(r, TileChoice)}
    return {chip: {"tiles": tiles, "convolutions": convolutions}}


def save_table(table: dict[str, Any]) -> Path:
    """Writes ``table`` over the user's own, in which other chips' rows stay, and returns the path.

    Raises: InputError if this user has no home directory, or it cannot be written.
    """
    path = configs.user_table()
    if path is None:
        raise InputError("this user has no home directory for the table; set FASTMSFLOW_TABLE to a file's path")
    with written_aside(path) as aside:
        aside.write_text(json.dumps(configs.read_user_table() | table, indent=1) + "\n")
    return path


def operation(
    kind: str,
    channels: int,
    size: int,
    device: torch.device,
    *,
    batch: int,
    dtype: torch.dtype = torch.bfloat16,
) -> Callable[[], object]:
    """Makes a call of a convolution with what follows it, at the shapes of a level.

    ``kind``: one of fastmsflow.kernels.configs.KINDS; ``channels``, ``size``: of the level.
    """

    make = partial(new, dtype, device)
    width = channels // 2 + CONDITION
    shrink = 1 / (3 * width**0.5)
    x, hidden = make(batch, channels, size, size), make(batch, width, size, size)
    weight, bias = make(channels, width, 3, 3).mul(shrink), make(channels)
    if kind == "conv3x3":
        return lambda: conv3x3(hidden, weight, bias, "triton")
    if kind == "conv3x3_layer_norm":
        half, first = x[:, : channels // 2], make(width, channels // 2, 3, 3).mul(shrink)
        norm, condition = (make(width), make(width)), make(1, width, size, size)
        return lambda: conv3x3_layer_norm_relu(half, first, norm, condition, backend="triton")
    if kind == "conv3x3_coupling":
        halves = (make(batch, channels // 2, size, size), make(batch, channels // 2, size, size))
        perm = torch.randperm(channels, device=device)
        scale, offset = make(channels).float() + 10, make(channels).float()
        affine = GlobalAffine(scale=scale, offset=offset, perm=perm, inverse_perm=perm.argsort())
        spec = CouplingSpec(clamp=CLAMP)
        return lambda: conv3x3_coupling(hidden, weight, bias, halves, spec=spec, affine=affine, backend="triton")
    return lambda: convolution_gradients(x, hidden, weight, kind == "conv3x3_input_gradient")


def _one_per_shape(cases: list[KernelCase]) -> list[KernelCase]:
    """Returns the first case of every launcher, level and arithmetic: others differ little and cost a compilation."""
    first: dict[tuple[object, int, str], KernelCase] = {}
    for case in cases:
        first.setdefault((case.launch.func, case.level, case.arithmetic), case)
    return list(first.values())


def _choose_tile(kernel: str, cases: list[KernelCase], device: torch.device, timer: Timer) -> TileChoice:
    """Takes the fastest of the kernel's candidates into the process's table, if it is faster than the tile it has."""
    chip = configs.chip(device)
    before = (configs.tile if kernel in configs.TILES else configs.product_tile)(kernel, device)
    timed = [case for case in cases if case.arithmetic == "bfloat16"] or cases
    expected = [list(tensors(case.launch())) for case in cases]
    start = [timer(case.launch) for case in timed]

    def speedup(size: Tile | ProductTile) -> float:
        """Returns how much faster ``size`` is than ``before``, or 0 if it does not serve."""
        _use_tile(chip, kernel, size)
        try:
            if not all(_agree(e, list(tensors(c.launch()))) for c, e in zip(cases, expected, strict=True)):
                return 0.0
            return geometric_mean(old / timer(case.launch) for old, case in zip(start, timed, strict=True))
        # The compiler's passes fail with a plain RuntimeError.
        except (OutOfResources, PTXASError, CompilationError, RuntimeError):
            return 0.0

    speedups = {size: speedup(size) for size in configs.TUNING_CANDIDATES[kernel] if size != before}
    best, best_speedup = max(speedups.items(), key=lambda pair: pair[1])
    if best_speedup < LEAST_SPEEDUP:
        best, best_speedup = before, 1.0
    _use_tile(chip, kernel, best)
    return TileChoice(kernel=kernel, before=before, after=best, speedup=best_speedup)


def _use_tile(chip: str, kernel: str, size: Tile | ProductTile) -> None:
    configs.apply({chip: {"tiles": {kernel: asdict(size)}}})


def _agree(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(
        (a.float() - b.float()).abs().max() <= AGREEMENT * b.abs().max() for a, b in zip(ours, theirs, strict=True)
    )


def _time_both(kind: str, call: Callable[[], object], device: torch.device, timer: Timer) -> tuple[float, float]:
    """Returns the milliseconds of ``call`` with the kernels' own convolution, and with the vendor's."""
    times = []
    for own in (True, False):
        with torch.no_grad(), configs.force_convolution(kind, own, device):
            times.append(timer(call))
    return times[0], times[1]
