"""The 3x3 convolution on its own, and what the operations that begin with one share."""

from typing import Any, cast

import torch
from torch import Tensor, library

from ..backend import Backend, resolve, uses_triton
from ..cpu import convolution as cpu_inference
from ..cpu import training as cpu_training
from ..errors import InputError
from ..kernels.channels_last import new_rows
from ..reference import conv3x3 as reference


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """Computes fastmsflow.reference.conv3x3.conv3x3. Differentiable by all its tensors.

    Raises: InputError if shapes or dtypes do not fit.
    """
    check_convolution(x, weight, bias)
    if not uses_triton_convolution("conv3x3", backend, x, len(weight)):
        if resolve(backend) == "auto":
            if cpu_inference.serves(x, weight, bias):
                return cpu_inference.convolve(x, weight, bias)
            if cpu_training.serves(x, weight, bias):
                return cpu_training.convolve(x, weight, bias)
        return reference.conv3x3(x, weight, bias)
    return Conv3x3.apply(*in_autocast_dtype(x, weight), bias)


def check_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Checks x (B, I, H, W), weight (O, I, 3, 3) and bias (O,).

    Raises: InputError if the shapes do not fit.
    """
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        raise InputError(
            f"x is {tuple(x.shape)}, weight {tuple(weight.shape)}; they need (B, I, H, W) and (O, I, 3, 3)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"bias is {tuple(bias.shape)}, weight {tuple(weight.shape)}; bias needs one value an output")


def uses_triton_convolution(kind: str, backend: Backend, x: Tensor, outputs: int) -> bool:
    """Tells whether the kernels' own convolution computes: if they serve, and if it was measured to beat the vendor's.

    ``kind``: one of fastmsflow.kernels.configs.KINDS.
    """
    return uses_triton(backend, x) and _own_convolution_is_faster(kind, x, outputs)


def _own_convolution_is_faster(kind: str, x: Tensor, outputs: int) -> bool:
    from ..kernels import configs

    return configs.own_convolution_is_faster(kind, x.shape[0] * x.shape[2] * x.shape[3], outputs, x.device)


def in_autocast_dtype(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Casts a convolution's operands as autocast does.

    Raises: InputError if they then have two dtypes.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if x.dtype != weight.dtype:
        raise InputError(f"x is {x.dtype}, weight {weight.dtype}; convert one of them, or use torch.autocast")
    return x, weight


def precision(x: Tensor) -> str:
    """Returns how float32 operands are multiplied, "tf32" or "ieee", as PyTorch's own convolutions do."""
    return "tf32" if x.dtype == torch.float32 and rounds_to_tf32() else "ieee"


def rounds_to_tf32() -> bool:
    """Tells whether PyTorch's convolutions round float32 on a GPU."""
    # ``allow_tf32`` raises if parts of the flag were set apart.
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


class Conv3x3(torch.autograd.Function):
    """Differentiates ``_conv3x3``."""

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


def convolution_gradients(
    grad_out: Tensor, x: Tensor, weight: Tensor, x_needs_grad: bool
) -> tuple[Tensor | None, Tensor]:
    """Computes the gradients of x, or None if it needs none, as features, and of weight.

    Each is computed by the kernels or by the vendor's library, whichever was measured to be faster.
    """
    grad_out = grad_out.to(x.dtype)
    outputs = len(weight)
    own_x = x_needs_grad and _own_convolution_is_faster("conv3x3_input_gradient", x, outputs)
    own_weight = _own_convolution_is_faster("conv3x3_weight_gradient", x, outputs)
    vendors = [x_needs_grad and not own_x, not own_weight, False]
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
    """Sums grad_out (B, O, H, W) in float32 to the gradient of a bias (O,) of ``dtype``."""
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
