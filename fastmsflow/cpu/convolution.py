"""Chooses how a CPU convolves in inference, and caches the weights that the choice prepared.

The choice is made for tensors on an x86-64 CPU if gradients are disabled: Winograd's algorithm for 3x3 convolutions of
stride 1 in float32 that are wide enough, else oneDNN with packed weights. Prepared weights live as long as their
weight does, and are prepared anew when it changes. Programs of ``for_inference(compile=True)`` call an operator for
the convolutions that Winograd's algorithm may compute; Inductor has the others, and all in other graphs.
"""

import math
import os
import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.jit._trace import is_tracing
from torch.utils.weak import WeakIdKeyDictionary

from ..available_memory import available_memory
from ..errors import InputError
from ..reference.convolution_relu import Geometry
from ..reference.reflection_pad import reflection_pad
from ..weight_state import WeightState
from . import onednn, winograd
from .winograd import Chunk, Tile

SAME = Geometry(padding=(1, 1))
"""The geometry of a 3x3 convolution that keeps the grid."""
MEMORY_VARIABLE = "FASTMSFLOW_WINOGRAD_MEMORY"
"""The variable of the environment that bounds the transformed filters of a process, in MiB; 0 for no Winograd."""

# The tiles to choose from, in this order, and the width I O / (I + O) from which each wins: transforms take as many
# operations as there are channels, the product as many as there are pairs of them. F2 is for filters that the memory
# does not hold four times as large. Measured: benchmarks/results/cpu/convolutions.md.
NARROWEST = {winograd.F4: 60.0, winograd.F2: 170.0}
# A product of fewer tiles reads its filters for too little.
FEWEST_TILES = 16
# Batches of two sizes share the cache: the last one of a set is often smaller.
SHAPES_HELD = 2


class Plan(NamedTuple):
    """Says how inputs of one shape are convolved."""

    packed: onednn.Packed
    """The convolution or, with a tile, the product of Winograd's algorithm."""
    reflects: bool
    """True if the border reflects the input; the convolution of ``packed`` then pads nothing."""
    tile: Tile | None = None
    chunk: Chunk | None = None

    def convolve(self, x: Tensor, residual: Tensor | None = None, *, relu: bool = False) -> Tensor:
        """Computes convolution(x) + bias + residual, and relu of it if ``relu``."""
        if self.tile is None or self.chunk is None:
            return self.packed(reflection_pad(x, (1, 1, 1, 1)) if self.reflects else x, residual, relu)
        outputs = len(self.packed.weight) // self.tile.places
        result = winograd.convolve(x, self._product, outputs, tile=self.tile, chunk=self.chunk, reflect=self.reflects)
        if residual is not None:
            result += residual
        return result.relu_() if relu else result

    def _product(self, tiles: Tensor) -> Tensor:
        """Multiplies tiles (T, places * I) by the filters: (T, places * O)."""
        return self.packed(tiles.t()[None, :, :, None]).squeeze(3).squeeze(0).t()


class _Entry(NamedTuple):
    """Holds the plans of a weight by shape, and the state of weight and bias when they were made.

    The bias is held, so that no new one can lie where it lay; the weight is not, so that it can be freed.
    """

    state: WeightState
    bias: Tensor | None
    plans: dict[Hashable, Plan]

    def is_of(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Tells whether the plans are still those of weight and bias."""
        return self.bias is bias and self.state.is_of(_tensors(weight, bias))


_entries = WeakIdKeyDictionary()
_preparing = threading.Lock()
_memory: int | None = None
# Not a ContextVar: torch.compile does not trace those.
_in_programs = False
_callers = 0
_counting = threading.Lock()


def may_compute(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tells whether x is computed on a CPU by operators that know these tensors."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.numel() > 0
        and all(type(operand) in (Tensor, nn.Parameter) for operand in (x, *_tensors(weight, bias)))
        and not (is_tracing() or is_transformed() or torch.is_autocast_enabled("cpu"))
        and onednn.is_available()
    )


def is_transformed() -> bool:
    """Tells whether torch.func or a mode watches operators, or tangents are computed: these operators have no rules."""
    return (
        peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
    )


def _tensors(weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    return [weight] if bias is None else [weight, bias]


def serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tells whether ``convolve`` may compute now: on a CPU, with gradients disabled, in no graph but a program's."""
    if torch.compiler.is_compiling():
        return _in_programs and _may_win(x, weight)
    if torch.is_grad_enabled():
        # An optimizer's fused step, which may follow, does not tell of changes; and values that are derived from
        # weights are new in each call then, so that preparing them would be in vain.
        forget(weight)
        return False
    # Inference tensors do not tell of changes.
    tell_of_changes = not (weight.is_inference() or (bias is not None and bias.is_inference()))
    return tell_of_changes and x.dtype in (torch.float32, torch.bfloat16) and may_compute(x, weight, bias)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry = SAME,
    *,
    reflects: bool = False,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Computes convolution(x) + bias + residual, and relu of it if ``relu``, where it ``serves``.

    x (B, I, H, W), weight (O, I / groups, h, w), bias (O,), residual (B, O, H', W'): the result's shape. ``reflects``:
    whether a border of one pixel reflects x, beside the padding of ``geometry``.
    """
    if torch.compiler.is_compiling():
        numbers = [*geometry.stride, *geometry.padding, *geometry.dilation, geometry.groups]
        return _convolve(x, weight, bias, residual, geometry=numbers, reflects=reflects, relu=relu)
    entry = _entries.get(weight)
    key = (x.shape, geometry, reflects)
    plan = entry.plans.get(key) if entry is not None and entry.is_of(weight, bias) else None
    if plan is None:
        with _preparing:
            entry = _entries.get(weight)
            if entry is None or not entry.is_of(weight, bias):
                _entries[weight] = entry = _Entry(WeightState(_tensors(weight, bias)), bias, {})
            plan = _plan(x, weight, bias, geometry, reflects=reflects, others=list(entry.plans.values()))
            if len(entry.plans) >= SHAPES_HELD:
                del entry.plans[next(iter(entry.plans))]
            entry.plans[key] = plan
    return plan.convolve(x, residual, relu=relu)


@contextmanager
def in_programs() -> Iterator[None]:
    """Has programs of torch.compile that are traced or called in the block convolve here, where Winograd may win.

    Their weights must be constants: what is prepared for others might serve a single call.
    """
    global _in_programs, _callers
    with _counting:
        _callers += 1
        _in_programs = onednn.is_available()
    try:
        yield
    finally:
        with _counting:
            _callers -= 1
            _in_programs = _in_programs and _callers > 0


def _may_win(x: Tensor, weight: Tensor) -> bool:
    """Tells whether Winograd's algorithm may win for x and weight of a graph."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and weight.shape[1:] == (x.shape[1], 3, 3)
        and is_wide_enough(weight, NARROWEST[winograd.F4])
        and not torch.is_autocast_enabled("cpu")
    )


@library.custom_op("fastmsflow::cpu_convolve", mutates_args=())
def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    geometry: Sequence[int],
    reflects: bool,
    relu: bool,
) -> Tensor:
    out = convolve(x, weight, bias, _geometry(geometry), reflects=reflects, residual=residual, relu=relu)
    return out.contiguous(memory_format=torch.channels_last)


@_convolve.register_fake
def _(x: Tensor, weight: Tensor, *_: Any, geometry: Sequence[int], reflects: bool, **__: Any) -> Tensor:
    stride, padding, dilation, groups = _geometry(geometry)
    padding = (padding[0] + reflects, padding[1] + reflects)
    return F.conv2d(x, weight, None, stride, padding, dilation, groups).contiguous(memory_format=torch.channels_last)


def _geometry(numbers: Sequence[int]) -> Geometry:
    """Returns the geometry of an operator's seven numbers."""
    sh, sw, ph, pw, dh, dw, groups = numbers
    return Geometry((sh, sw), (ph, pw), (dh, dw), groups)


@contextmanager
def nothing_kept() -> Iterator[None]:
    """Drops what is prepared in the block."""
    before = set(map(id, _entries))
    try:
        yield
    finally:
        forget(*(weight for weight in list(_entries) if id(weight) not in before))


def forget(*weights: Tensor) -> None:
    """Drops what was prepared for ``weights``, which is needed if a change of theirs does not show."""
    for weight in weights:
        _entries.pop(weight, None)


def set_winograd_memory(mebibytes: int | None) -> None:
    """Bounds the transformed filters of this process, in MiB; 0 switches Winograd's algorithm off.

    ``mebibytes``: None for what FASTMSFLOW_WINOGRAD_MEMORY says or, if that is unset, for a quarter of the memory that
    is available when filters are transformed (on Linux; none elsewhere, where it is not known). Drops all filters: the
    next predictions transform theirs anew.

    Raises: InputError if ``mebibytes`` is negative.
    """
    global _memory
    if mebibytes is not None and mebibytes < 0:
        raise InputError(f"{mebibytes} MiB for Winograd's filters; give 0 or more")
    _memory = mebibytes
    _entries.clear()


def _have_room(needed: int) -> bool:
    """Tells whether ``needed`` bytes of transformed filters may be added to those that are held.

    Raises: InputError if the variable of the environment is no number.
    """
    held = _held_bytes()
    given = os.environ.get(MEMORY_VARIABLE)
    if _memory is not None:
        bound = _memory << 20
    elif given is None:
        bound = (held + available_memory()) // 4
    elif given.isascii() and given.isdigit():
        bound = int(given) << 20
    else:
        raise InputError(f"{MEMORY_VARIABLE} is {given!r}; give a whole number of MiB, 0 for no Winograd convolutions")
    return held + needed <= bound


def _plan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    *,
    reflects: bool,
    others: list[Plan],
) -> Plan:
    """Prepares the weight for inputs of x's shape; filters of ``others``, the weight's plans so far, are shared."""
    batch, inputs, height, width = x.shape
    if x.dtype == torch.float32 and weight.shape[1:] == (inputs, 3, 3) and _keeps_the_grid(geometry, reflects):
        for tile, narrowest in NARROWEST.items():
            chunk = winograd.plan_chunk(x.shape, len(weight), tile)
            if not is_wide_enough(weight, narrowest) or chunk.tiles < FEWEST_TILES:
                continue
            for other in others:
                if other.tile is tile and other.chunk is not None and other.chunk.tiles == chunk.tiles:
                    return Plan(other.packed, reflects, tile, chunk)
            if _have_room(4 * tile.places * inputs * len(weight)):
                return winograd_plan(weight, bias, tile, chunk, reflects=reflects)
    border = 2 if reflects else 0
    return Plan(onednn.pack(weight, bias, geometry, (batch, inputs, height + border, width + border)), reflects)


def winograd_plan(weight: Tensor, bias: Tensor | None, tile: Tile, chunk: Chunk, *, reflects: bool = False) -> Plan:
    """Transforms weight (O, I, 3, 3) and bias (O,), and packs them for the products of ``chunk``."""
    filters = winograd.transform_filters(weight, tile)
    at_places = None if bias is None else winograd.transform_bias(bias, tile)
    shape = (1, tile.places * weight.shape[1], chunk.tiles, 1)
    return Plan(onednn.pack(filters, at_places, Geometry(groups=tile.places), shape), reflects, tile, chunk)


def is_wide_enough(weight: Tensor, narrowest: float) -> bool:
    """Tells whether the width I O / (I + O) of weight (O, I, 3, 3) is at least ``narrowest``."""
    outputs, inputs = weight.shape[:2]
    return inputs * outputs >= narrowest * (inputs + outputs)


def _keeps_the_grid(geometry: Geometry, reflects: bool) -> bool:
    """Tells whether a 3x3 convolution has stride 1, no groups and a border of one pixel."""
    return geometry == (Geometry() if reflects else SAME)


def _held_bytes() -> int:
    """Returns the size of all transformed filters."""
    plans = [plan for entry in list(_entries.values()) for plan in entry.plans.values() if plan.tile is not None]
    filters = {id(plan.packed): plan.packed.weight for plan in plans}
    return sum(4 * math.prod(weight.shape) for weight in filters.values())
