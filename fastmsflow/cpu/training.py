"""The 3x3 convolution of a training step on a CPU, by Winograd's algorithm where it wins.

Output and input gradient are computed by the algorithm, with filters that are transformed in each step; so there have
to be enough tiles for them. The gradient of the weight is oneDNN's own: in the algorithm's space it is a product over
tiles, for which PyTorch has only the matrix products of its BLAS, and those took as long.
"""

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from . import winograd
from .convolution import is_transformed, is_wide_enough, may_compute, winograd_plan
from .winograd import F4

# The fewest tiles of a batch, and the width I O / (I + O), from which it pays to transform the filters of both passes.
# Measured: benchmarks/results/cpu/convolutions.md.
FEWEST_TILES = 512
NARROWEST = 100.0


def serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tells whether ``convolve`` computes a training step's convolution faster than PyTorch does."""
    batch, _, height, width = x.shape
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and any(operand is not None and operand.requires_grad for operand in (x, weight, bias))
        and x.dtype == torch.float32
        and batch * height * width >= 16 * FEWEST_TILES
        and is_wide_enough(weight, NARROWEST)
        and may_compute(x, weight, bias)
    )


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes the 3x3 convolution with zero padding 1 where it ``serves``. Differentiable by all its tensors.

    x (B, I, H, W), weight (O, I, 3, 3), bias (O,): (B, O, H, W).
    """
    return _Convolution.apply(x, weight, bias)


class _Convolution(torch.autograd.Function):
    """Differentiates the convolution."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        chunk = winograd.plan_chunk(x.shape, len(weight), F4)
        return winograd_plan(weight, bias, F4, chunk).convolve(x)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, *needs = ctx.needs_input_grad
        grad_x, grad_weight, grad_bias = None, None, None
        # Batched gradients, as a Jacobian's, are PyTorch's own.
        by_pytorch = needs_x and (is_transformed() or is_legacy_batchedtensor(grad_out))
        if needs_x and not by_pytorch:
            # The adjoint of a convolution is one with the filters turned round, from outputs to inputs.
            grad_x = _Convolution.apply(grad_out, weight.flip(2, 3).transpose(0, 1), None)
        if by_pytorch or any(needs):
            ones = [1, 1]
            bias_shape = [len(weight)] if ctx.has_bias else None
            own_grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
                grad_out, x, weight, bias_shape, ones, ones, ones, False, [0, 0], 1, [by_pytorch, *needs]
            )
            grad_x = own_grad_x if by_pytorch else grad_x
        return grad_x, grad_weight, grad_bias
