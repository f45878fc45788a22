"""3x3 convolution, layer normalization and ReLU: the first half of a subnet."""

from typing import Any

import torch
from torch import Tensor, library

from ..backend import Backend
from ..kernels.channels_last import new_rows
from ..reference.layer_norm import LAYER_NORM_EPS
from .conv3x3 import (
    check_convolution,
    conv3x3,
    convolution_gradients,
    in_autocast_dtype,
    precision,
    uses_triton_convolution,
)
from .layer_norm import check_condition, layer_norm_gradients, layer_norm_relu


def conv3x3_layer_norm_relu(
    x: Tensor,
    weight: Tensor,
    norm: tuple[Tensor, Tensor],
    condition: Tensor,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Computes fastmsflow.reference.conv3x3_layer_norm.conv3x3_layer_norm_relu. Differentiable by all its tensors.

    Raises: InputError if shapes or dtypes do not fit.
    """
    check_convolution(x, weight, None)
    check_condition(condition, len(weight), x)
    if uses_triton_convolution("conv3x3_layer_norm", backend, x, len(weight)):
        from ..kernels.conv3x3_layer_norm import fuses_layer_norm

        if fuses_layer_norm(len(weight)):
            for_backward = torch.is_grad_enabled()
            return ConvLayerNormReLU.apply(*in_autocast_dtype(x, weight), *norm, condition, for_backward)
    return layer_norm_relu(conv3x3(x, weight, None, backend), *norm, condition, backend=backend)


class ConvLayerNormReLU(torch.autograd.Function):
    """Differentiates ``_conv_layer_norm_relu``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        condition: Tensor,
        for_backward: bool,
    ) -> Tensor:
        norm = (norm_weight, norm_bias)
        out, *statistics = _conv_layer_norm_relu(x, weight, condition, *norm, LAYER_NORM_EPS, for_backward)
        ctx.save_for_backward(x, weight, *norm, *statistics)
        ctx.condition = condition.dtype, condition.shape[2:]
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, norm_weight, norm_bias, hidden, mean, rstd = ctx.saved_tensors
        grad_hidden, *grad_norm, grad_condition = layer_norm_gradients(
            grad_out, (hidden, None, norm_weight, norm_bias), (mean, rstd), ctx.condition
        )
        grads = convolution_gradients(grad_hidden, x, weight, ctx.needs_input_grad[0])
        return *grads, *grad_norm, grad_condition, None


@library.custom_op("fastmsflow::conv3x3_layer_norm_relu", mutates_args=())
def _conv_layer_norm_relu(
    x: Tensor, weight: Tensor, condition: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, keep: bool
) -> list[Tensor]:
    from ..kernels import conv3x3_layer_norm as kernels

    norm = (norm_weight, norm_bias)
    return kernels.conv3x3_layer_norm_relu(
        x, weight, condition, norm, eps=eps, precision=precision(x), for_backward=keep
    )


@_conv_layer_norm_relu.register_fake
def _(x: Tensor, weight: Tensor, *operands: Any) -> list[Tensor]:
    keep = operands[-1]
    out = [new_rows(x, len(weight)) for _ in range(2 if keep else 1)]
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    return [*out, *(x.new_empty(pixels, dtype=torch.float32) for _ in range(2 if keep else 0))]
