"""Hill climbing over the tiles, one kernel after the other; then own against vendor's convolution, shape by shape."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from ..files import written_aside
from ..kernels import configs
from ..kernels.launch import ProductTile, Tile
from ..ops.conv3x3 import conv3x3, convolution_gradients
from ..ops.conv3x3_coupling import conv3x3_coupling
from ..ops.conv3x3_layer_norm import conv3x3_layer_norm_relu
from .kernel_cases import CONDITION, LEVELS, Case, cases, new, permutation, tensors

Size = Tile | ProductTile
Timer = Callable[[Callable[[], object]], float]
# A tile must be this much faster than the one it replaces: less is noise.
GAIN = 1.02
# Largest difference, relative to the largest value, between what two tiles compute: another order of the same sums,
# then bfloat16's rounding.
AGREEMENT = 2e-2
MOST_WARPS, LEAST_WARPS, MOST_STAGES = 16, 1, 6


@dataclass(frozen=True)
class Choice:
    """A kernel's tile before and after, and how much faster the new one is (geometric mean over its shapes)."""

    kernel: str
    before: Size
    after: Size
    gain: float


@dataclass(frozen=True)
class Contest:
    """A convolution at one shape: milliseconds of the kernels' own and of the vendor's, with what surrounds them."""

    kind: str
    pixels: int
    outputs: int
    own: float
    vendors: float


def tune(
    device: torch.device,
    timer: Timer,
    levels: Sequence[tuple[int, int]] = LEVELS,
    batches: Sequence[int] = (1, 8, 32),
    image_size: int = 512,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Iterator[Choice | Contest]:
    """Yields what was found, and puts it into the process's table (kernels.tables) as it goes.

    ``timer``: milliseconds of a call. Tiles are timed in bfloat16 at the middle of ``batches``, and serve float32 too.
    ``progress``: gets what is measured, how many measurements are done and of how many.
    """
    chip = configs.chip(device)
    by_kernel: dict[str, list[Case]] = {}
    for case in cases(levels, sorted(batches)[len(batches) // 2], image_size, device):
        by_kernel.setdefault(case.tiles, []).append(case)
    contests = [(kind, level, batch) for kind in configs.KINDS for level in levels for batch in batches]
    total = len(by_kernel) + len(contests)
    for done, (kernel, all_cases) in enumerate(by_kernel.items()):
        progress(kernel, done, total)
        yield _climb(kernel, _one_per_shape(all_cases), chip, device, timer)
    configs.CONVOLUTIONS[chip] = {kind: [] for kind in configs.KINDS}
    found: dict[str, list[tuple[int, int, bool]]] = {kind: [] for kind in configs.KINDS}
    for done, (kind, level, batch) in enumerate(contests, len(by_kernel)):
        progress(f"{kind}, {level[0]} channels, batch {batch}", done, total)
        contest = _contest(kind, level, batch, device, timer)
        found[kind].append((contest.pixels, contest.outputs, contest.own < contest.vendors))
        yield contest
    configs.CONVOLUTIONS[chip] = found


def as_table(chip: str, results: Sequence[Choice | Contest]) -> dict[str, Any]:
    """What the user's table says of ``chip``: see kernels.tables.read_user_table."""
    convolutions: dict[str, list[tuple[int, int, bool]]] = {}
    for r in results:
        if isinstance(r, Contest):
            convolutions.setdefault(r.kind, []).append((r.pixels, r.outputs, r.own < r.vendors))
    tiles = {r.kernel: asdict(r.after) for r in results if isinstance(r, Choice)}
    return {chip: {"tiles": tiles, "convolutions": convolutions}}


def save_table(table: dict[str, Any]) -> Path:
    """Writes ``table`` over the user's own, of which other chips' rows stay; returns where."""
    path = configs.user_table()
    with written_aside(path) as aside:
        aside.write_text(json.dumps(configs.read_user_table() | table, indent=1) + "\n")
    return path


def _one_per_shape(all_cases: list[Case]) -> list[Case]:
    """The first case of every launcher, level and arithmetic: others differ little and cost a compilation."""
    first: dict[tuple[object, int, str], Case] = {}
    for case in all_cases:
        first.setdefault((case.launch.func, case.level, case.arithmetic), case)
    return list(first.values())


def _climb(kernel: str, some: list[Case], chip: str, device: torch.device, timer: Timer) -> Choice:
    before: Size = (configs.tile if kernel in configs.TILES else configs.product_tile)(kernel, device)
    timed = [case for case in some if case.arithmetic == "bfloat16"] or some
    others = [case for case in some if case not in timed]
    expected = {case: list(tensors(case.launch())) for case in some}
    start = [timer(case.launch) for case in timed]

    def gain(size: Size) -> float:
        """How much faster than ``before``; 0 where it does not serve."""
        _set(chip, kernel, size)
        try:
            if not all(_agree(expected[case], list(tensors(case.launch()))) for case in [*timed, *others]):
                return 0.0
            ratios = [old / timer(case.launch) for old, case in zip(start, timed, strict=True)]
        # The compiler's passes fail with a plain RuntimeError.
        except (OutOfResources, PTXASError, CompilationError, RuntimeError):
            return 0.0
        return math.exp(sum(map(math.log, ratios)) / len(ratios))

    best, best_gain, tried = before, 1.0, {before}
    while True:
        candidates = [size for size in neighbours(best) if size not in tried]
        tried.update(candidates)
        gains = [gain(size) for size in candidates]
        if max(gains, default=0.0) < best_gain * GAIN:
            break
        best_gain = max(gains)
        best = candidates[gains.index(best_gain)]
    _set(chip, kernel, best)
    return Choice(kernel, before, best, best_gain)


def neighbours(size: Size) -> list[Size]:
    """One field doubled or halved, or one stage more or less; products' tiles not below 16."""
    least = 16 if isinstance(size, ProductTile) else 1
    found = []
    for field in fields(size):
        value = getattr(size, field.name)
        if field.name == "stages":
            near = [n for n in (value - 1, value + 1) if 1 <= n <= MOST_STAGES]
        elif field.name == "warps":
            near = [n for n in (value // 2, value * 2) if LEAST_WARPS <= n <= MOST_WARPS]
        else:
            near = [n for n in (value // 2, value * 2) if n >= least]
        found += [replace(size, **{field.name: n}) for n in near]
    return found


def _set(chip: str, kernel: str, size: Size) -> None:
    configs.apply({chip: {"tiles": {kernel: asdict(size)}}})


def _agree(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(
        (a.float() - b.float()).abs().max() <= AGREEMENT * b.abs().max() for a, b in zip(ours, theirs, strict=True)
    )


def _contest(kind: str, level: tuple[int, int], batch: int, device: torch.device, timer: Timer) -> Contest:
    channels, size = level
    width, pixels = channels // 2 + CONDITION, batch * size * size
    outputs = width if kind == "conv3x3_layer_norm" else channels
    call = operation(kind, channels, size, batch, device)
    times = []
    for own in (True, False):
        with torch.no_grad(), configs.deciding(kind, own, device):
            times.append(timer(call))
    return Contest(kind, pixels, outputs, *times)


def operation(
    kind: str, channels: int, size: int, batch: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> Callable[[], object]:
    """A call of the convolution of ``kind`` (see kernels.tables.KINDS) with what follows it, at a level's shapes."""

    def make(*shape: int) -> Tensor:
        return new(dtype, device, *shape)

    width = channels // 2 + CONDITION
    shrink = 1 / (3 * width**0.5)
    x, hidden = make(batch, channels, size, size), make(batch, width, size, size)
    weight, bias = make(channels, width, 3, 3).mul(shrink), make(channels)
    if kind == "conv3x3":
        return lambda: conv3x3(hidden, weight, bias, "triton")
    if kind == "conv3x3_layer_norm":
        half, first = x[:, : channels // 2], make(width, channels // 2, 3, 3).mul(shrink)
        norm, condition = (make(width), make(width)), make(1, width, size, size)
        return lambda: conv3x3_layer_norm_relu(half, first, *norm, condition, "triton")
    if kind == "conv3x3_coupling":
        x1, x2 = (make(batch, channels // 2, size, size) for _ in range(2))
        perm = permutation(channels, device)
        fixed = (make(channels).float() + 10, make(channels).float(), perm, perm.argsort(), 1.9)
        return lambda: conv3x3_coupling(hidden, weight, bias, x1, x2, *fixed, "tanh", backend="triton")
    return lambda: convolution_gradients(x, hidden, weight, kind == "conv3x3_input_gradient")
