"""The fusion subnet's way of carrying information between the levels: pool to one grid, and back up."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

from ..backend import Backend, uses_triton
from ..errors import InputError
from ..kernels.channels_last import new_rows
from ..reference import fusion as reference
from . import records_gradients
from .conv3x3 import bias_gradient, conv3x3


def pool_and_concat(maps: Sequence[Tensor], backend: Backend = "auto") -> Tensor:
    """Computes fastmsflow.reference.fusion.pool_and_concat. Differentiable by the maps."""
    if not uses_triton(backend, maps[0]):
        return reference.pool_and_concat(maps)
    return PoolAndConcat.apply(*maps) if records_gradients(*maps) else _pool(list(maps))


def split_and_upsample(
    joint: Tensor, bias: Tensor | None, maps: Sequence[Tensor], backend: Backend = "auto"
) -> list[Tensor]:
    """Computes fastmsflow.reference.fusion.split_and_upsample. Differentiable by joint, bias and the maps.

    Raises: InputError if joint has not the maps' channels.
    """
    channels = [level.shape[1] for level in maps]
    if joint.shape[1] != sum(channels):
        raise InputError(f"joint has {joint.shape[1]} channels; the maps have {channels}")
    if not uses_triton(backend, joint):
        return reference.split_and_upsample(joint, bias, maps)
    if not records_gradients(joint, bias, *maps):
        return _upsample(joint, bias, list(maps))
    return list(SplitAndUpsample.apply(joint, bias, *maps))


def conv3x3_split_and_upsample(
    hidden: Tensor, weight: Tensor, bias: Tensor, maps: Sequence[Tensor], *, backend: Backend = "auto"
) -> list[Tensor]:
    """Computes fastmsflow.reference.fusion.conv3x3_split_and_upsample. Differentiable by all its tensors.

    Raises: InputError if shapes do not fit.
    """
    if not uses_triton(backend, hidden):
        return split_and_upsample(conv3x3(hidden, weight, bias, backend), None, maps, backend)
    # The kernel, which reads the convolution's output anyway, adds the bias: the vendor's would in a pass more.
    return split_and_upsample(conv3x3(hidden, weight, None, backend), bias, maps, backend)


class PoolAndConcat(torch.autograd.Function):
    """Differentiates ``_pool``."""

    @staticmethod
    def forward(ctx: Any, *maps: Tensor) -> Tensor:
        # Backward needs their shapes alone; they live on as the residuals of the way back up.
        ctx.save_for_backward(*maps)
        return _pool(list(maps))

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, ...]:
        return tuple(_pool_backward(grad_out, list(ctx.saved_tensors)))


class SplitAndUpsample(torch.autograd.Function):
    """Differentiates ``_upsample``."""

    @staticmethod
    def forward(ctx: Any, joint: Tensor, bias: Tensor | None, *maps: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(joint, bias)
        return tuple(_upsample(joint, bias, list(maps)))

    @staticmethod
    def backward(ctx: Any, *grad_outs: Tensor) -> tuple[Tensor | None, ...]:
        joint, bias = ctx.saved_tensors
        grad_joint = _upsample_backward(list(grad_outs), joint, bias)
        grad_bias = None if bias is None else bias_gradient(grad_joint, bias.dtype)
        return grad_joint, grad_bias, *grad_outs


@library.custom_op("fastmsflow::pool_and_concat", mutates_args=())
def _pool(maps: list[Tensor]) -> Tensor:
    from ..kernels import fusion as kernels

    return kernels.pool_and_concat(maps)


@_pool.register_fake
def _(maps: list[Tensor]) -> Tensor:
    return new_rows(maps[-1], sum(level.shape[1] for level in maps))


@library.custom_op("fastmsflow::pool_and_concat_backward", mutates_args=())
def _pool_backward(grad_out: Tensor, maps: list[Tensor]) -> list[Tensor]:
    from ..kernels import fusion as kernels

    return kernels.pool_and_concat_backward(grad_out, maps)


@_pool_backward.register_fake
def _(grad_out: Tensor, maps: list[Tensor]) -> list[Tensor]:
    return [new_rows(level, level.shape[1]) for level in maps]


@library.custom_op("fastmsflow::split_and_upsample", mutates_args=())
def _upsample(joint: Tensor, bias: Tensor | None, maps: list[Tensor]) -> list[Tensor]:
    from ..kernels import fusion as kernels

    return kernels.split_and_upsample(joint, bias, maps)


@_upsample.register_fake
def _(joint: Tensor, bias: Tensor | None, maps: list[Tensor]) -> list[Tensor]:
    return [new_rows(level, level.shape[1]) for level in maps]


@library.custom_op("fastmsflow::split_and_upsample_backward", mutates_args=())
def _upsample_backward(grad_outs: list[Tensor], joint: Tensor, bias: Tensor | None) -> Tensor:
    from ..kernels import fusion as kernels

    return kernels.split_and_upsample_backward(grad_outs, joint, bias)


@_upsample_backward.register_fake
def _(grad_outs: list[Tensor], joint: Tensor, bias: Tensor | None) -> Tensor:
    return new_rows(joint, joint.shape[1])
