"""Padding by reflection, for the frozen extractor."""

from torch import Tensor, library

from ..backend import Backend, uses_triton
from ..errors import InputError
from ..kernels.channels_last import new_rows
from ..reference import reflection_pad as reference


def reflection_pad(x: Tensor, padding: tuple[int, int, int, int], backend: Backend = "auto") -> Tensor:
    """Computes fastmsflow.reference.reflection_pad.reflection_pad.

    By Triton the result is in channels-last memory and not differentiable, since the extractor is frozen.
    Raises: InputError if x is no batch of images, or an edge is to reflect more pixels than lie behind it.
    """
    if x.ndim != 4:
        raise InputError(f"x is {tuple(x.shape)}; give (B, C, H, W)")
    left, right, top, bottom = padding
    height, width = x.shape[2:]
    if min(padding) < 0 or max(left, right) >= width or max(top, bottom) >= height:
        raise InputError(
            f"an image of {height}x{width} pixels cannot be padded by {tuple(padding)} (left, right, top, bottom):"
            " give at least 0 and fewer than it has in that direction"
        )
    if not uses_triton(backend, x):
        return reference.reflection_pad(x, padding)
    return _reflection_pad(x, list(padding))


@library.custom_op("fastmsflow::reflection_pad", mutates_args=())
def _reflection_pad(x: Tensor, padding: list[int]) -> Tensor:
    from ..kernels import reflection_pad as kernels

    left, right, top, bottom = padding
    return kernels.reflection_pad(x, (left, right, top, bottom))


@_reflection_pad.register_fake
def _(x: Tensor, padding: list[int]) -> Tensor:
    return new_rows(reference.reflection_pad(x, (padding[0], padding[1], padding[2], padding[3])), x.shape[1])
