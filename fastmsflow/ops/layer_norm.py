"""Layer normalization over the channels of each pixel, then ReLU."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

from ..backend import Backend, uses_triton
from ..errors import InputError
from ..kernels.channels_last import new_rows
from ..reference import layer_norm as reference


def layer_norm_relu(
    x: Tensor, weight: Tensor, bias: Tensor, condition: Tensor | None = None, *, backend: Backend = "auto"
) -> Tensor:
    """Computes fastmsflow.reference.layer_norm.layer_norm_relu. Differentiable by all its tensors.

    Raises: InputError if shapes do not fit.
    """
    if x.ndim != 4 or weight.shape != (x.shape[1],) or bias.shape != weight.shape:
        raise InputError(
            f"x is {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {tuple(bias.shape)};"
            " they need to be (B, C, H, W), (C,) and (C,)"
        )
    if condition is not None:
        check_condition(condition, x.shape[1], x)
    if not uses_triton(backend, x):
        return reference.layer_norm_relu(x, weight, bias, condition)
    return LayerNormReLU.apply(x, weight, bias, condition)


def check_condition(condition: Tensor, channels: int, x: Tensor) -> None:
    """Checks that ``condition`` is a map of ``channels`` on the grid of x (B, I, H, W), or a bias.

    Raises: InputError if it is neither.
    """
    if condition.shape not in ((1, channels, *x.shape[2:]), (1, channels, 1, 1)):
        raise InputError(f"the condition's map is {tuple(condition.shape)}, x {tuple(x.shape)}; give one map for all")


class LayerNormReLU(torch.autograd.Function):
    """Differentiates ``_layer_norm_relu``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, condition: Tensor | None) -> Tensor:
        y, mean, rstd = _layer_norm_relu(x, condition, weight, bias, reference.LAYER_NORM_EPS)
        ctx.save_for_backward(x, condition, weight, bias, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        x, condition, weight, bias, *statistics = ctx.saved_tensors
        like_condition = None if condition is None else (condition.dtype, condition.shape[2:])
        return layer_norm_gradients(grad_y, (x, condition, weight, bias), statistics, like_condition)


def layer_norm_gradients(
    grad_y: Tensor,
    tensors: tuple[Tensor, Tensor | None, Tensor, Tensor],
    statistics: Sequence[Tensor],
    like_condition: tuple[torch.dtype, torch.Size] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Computes the gradients of x, weight, bias and, if its dtype and grid are given, of the condition's map.

    ``tensors``: x, condition, weight and bias; ``statistics``: mean and 1 / std of each pixel, (B H W,) each.
    """
    x, _, weight, bias = tensors
    grad_x, grad_weight, grad_bias = _layer_norm_relu_backward(grad_y, *tensors, *statistics)
    grad_condition = None
    if like_condition is not None:
        dtype, grid = like_condition
        over = 0 if grid == x.shape[2:] else (0, 2, 3)
        grad_condition = grad_x.sum(dim=over, keepdim=True, dtype=torch.float32).to(dtype)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), grad_condition


@library.custom_op("fastmsflow::layer_norm_relu", mutates_args=())
def _layer_norm_relu(
    x: Tensor, condition: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels import layer_norm as kernels

    return kernels.layer_norm_relu(x, condition, weight, bias, eps=eps)


@_layer_norm_relu.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    mean, rstd = (x.new_empty(pixels, dtype=torch.float32) for _ in range(2))
    return new_rows(x, x.shape[1]), mean, rstd


@library.custom_op("fastmsflow::layer_norm_relu_backward", mutates_args=())
def _layer_norm_relu_backward(
    grad_y: Tensor, x: Tensor, condition: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels import layer_norm as kernels

    return kernels.layer_norm_relu_backward(grad_y, x, condition, weight, bias=bias, mean=mean, rstd=rstd)


@_layer_norm_relu_backward.register_fake
def _(grad_y: Tensor, x: Tensor, condition: Tensor | None, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight, grad_bias = (weight.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    return new_rows(x, x.shape[1]), grad_weight, grad_bias
