"""The 3x3 convolution on its own, and what every operation that begins with one shares."""

from typing import Any, cast

import torch
from torch import Tensor, library

from ..backend import Backend, uses_triton
from ..errors import InputError
from ..kernels.channels_last import new_rows
from ..reference import conv3x3 as reference


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """See fastmsflow.reference.conv3x3.conv3x3. Differentiable by all its tensors."""
    check_convolution(x, weight, bias)
    if not uses_triton_convolution("conv3x3", backend, x, len(weight)):
        return reference.conv3x3(x, weight, bias)
    return Conv3x3.apply(*in_autocast_dtype(x, weight), bias)


def check_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Errors: InputError where the shapes do not fit."""
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        raise InputError(
            f"x is {tuple(x.shape)}, weight {tuple(weight.shape)}; they need (B, I, H, W) and (O, I, 3, 3)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"bias is {tuple(bias.shape)}, weight {tuple(weight.shape)}; bias needs one value an output")


def uses_triton_convolution(kind: str, backend: Backend, x: Tensor, outputs: int) -> bool:
    """Whether the kernels' own convolution computes: where they serve, and where it was measured to beat the vendor's.

    ``kind``: see fastmsflow.kernels.configs.
    """
    return uses_triton(backend, x) and _convolves(kind, x, outputs)


def _convolves(kind: str, x: Tensor, outputs: int) -> bool:
    from ..kernels.configs import convolves

    return convolves(kind, x.shape[0] * x.shape[2] * x.shape[3], outputs, x.device)


def in_autocast_dtype(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What autocast makes of a convolution's operands. Errors: InputError where they then differ."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if x.dtype != weight.dtype:
        raise InputError(f"x is {x.dtype}, weight {weight.dtype}; convert one of them, or use torch.autocast")
    return x, weight


def precision(x: Tensor) -> str:
    """How float32 operands are multiplied: as PyTorch's own convolutions do."""
    return "tf32" if x.dtype == torch.float32 and rounds_to_tf32() else "ieee"


def rounds_to_tf32() -> bool:
    """Whether PyTorch's convolutions round float32 on a GPU. ``allow_tf32`` raises where parts of it are set apart."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


class Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _conv3x3(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_bias = None if ctx.bias_dtype is None else bias_gradient(grad_out, ctx.bias_dtype)
        return *convolution_gradients(grad_out, x, weight, ctx.needs_input_grad[0]), grad_bias


def convolution_gradients(grad_out: Tensor, x: Tensor, weight: Tensor, of_x: bool) -> tuple[Tensor | None, Tensor]:
    """Gradients of x, where it is wanted (features want none), and of weight."""
    grad_out = grad_out.to(x.dtype)
    outputs = len(weight)
    own_x = of_x and _convolves("conv3x3_input_gradient", x, outputs)
    own_weight = _convolves("conv3x3_weight_gradient", x, outputs)
    vendors = [of_x and not own_x, not own_weight, False]
    grad_x, grad_weight = None, None
    if any(vendors):
        ones = [1, 1]
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad_out, x, weight, None, ones, ones, ones, False, [0, 0], 1, vendors
        )
    if own_x:
        grad_x = _input_gradient(grad_out, weight)
    if own_weight:
        grad_weight = _weight_gradient(x, grad_out).to(weight.dtype)
    # By the one or the other it has been computed.
    return grad_x, cast(Tensor, grad_weight)


def bias_gradient(grad_out: Tensor, dtype: torch.dtype) -> Tensor:
    return grad_out.sum(dim=(0, 2, 3), dtype=torch.float32).to(dtype)


@library.custom_op("fastmsflow::conv3x3", mutates_args=())
def _conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from ..kernels import conv3x3 as kernels

    return kernels.conv3x3(x, weight, bias, precision(x))


@_conv3x3.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return new_rows(x, len(weight))


@library.custom_op("fastmsflow::conv3x3_input_gradient", mutates_args=())
def _input_gradient(grad_out: Tensor, weight: Tensor) -> Tensor:
    from ..kernels import conv3x3 as kernels

    return kernels.conv3x3_input_gradient(grad_out, weight, precision(grad_out))


@_input_gradient.register_fake
def _(grad_out: Tensor, weight: Tensor) -> Tensor:
    return new_rows(grad_out, weight.shape[1])


@library.custom_op("fastmsflow::conv3x3_weight_gradient", mutates_args=())
def _weight_gradient(x: Tensor, grad_out: Tensor) -> Tensor:
    from ..kernels import conv3x3 as kernels

    return kernels.conv3x3_weight_gradient(x, grad_out, precision(x))


@_weight_gradient.register_fake
def _(x: Tensor, grad_out: Tensor) -> Tensor:
    return x.new_empty((grad_out.shape[1], 3, 3, x.shape[1]), dtype=torch.float32).permute(0, 3, 1, 2)
