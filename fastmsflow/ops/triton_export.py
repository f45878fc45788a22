"""Replaces operators by the kernels that they launch, for a compiler that puts the kernels into its output."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch._subclasses.functional_tensor import FunctionalTensorMode

from ..reference import score_map as reference
from . import (
    conv3x3,
    conv3x3_coupling,
    conv3x3_layer_norm,
    coupling,
    fusion,
    image_score,
    layer_norm,
    reflection_pad,
    score_map,
)

_enabled = False


@contextmanager
def inlined() -> Iterator[None]:
    """Has functional graphs that are made in the block, as AOTInductor's, hold launches instead of operators.

    This covers the operators that ``MSFlow.predict`` uses.
    """
    from ..kernels import launch

    global _enabled
    before, _enabled = _enabled, True
    try:
        with launch.recording():
            yield
    finally:
        _enabled = before


def _register(operator: Any, function: Callable[..., Any]) -> None:
    def in_functional_graph(mode: Any, op: Any, types: Any, args: Any, options: Any) -> Any:
        if not _enabled:
            return mode.__torch_dispatch__(op, types, args, options)
        with mode:
            return function(*args, **options)

    operator.register_torch_dispatch(FunctionalTensorMode, in_functional_graph)


for _operator in (
    conv3x3._conv3x3,
    conv3x3_coupling._conv_coupling,
    conv3x3_layer_norm._conv_layer_norm_relu,
    coupling._coupling,
    fusion._pool,
    fusion._upsample,
    image_score._image_scores,
    layer_norm._layer_norm_relu,
    reflection_pad._reflection_pad,
):
    _register(_operator, _operator._init_fn)
# This kernel takes the levels as tuples of pointers, which PyTorch cannot record.
_register(score_map._score_maps, reference.score_maps)
