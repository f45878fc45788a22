"""3x3 convolution and the coupling that its outputs drive: the second half of a subnet, and what follows it."""

from typing import Any

import torch
from torch import Tensor, library

from ..backend import Backend
from ..kernels.rows import new_rows
from ..reference.coupling import SUBNET_SCALE, ClampForm
from ..reference.fusion import output_limit
from . import coupling as unfused
from . import records_gradients
from .conv3x3 import (
    bias_gradient,
    check_convolution,
    conv3x3,
    convolution_gradients,
    in_autocast_dtype,
    precision,
    uses_triton_convolution,
)

# Global scale and offset, permutation and its inverse.
Affine = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
# Couplings across levels have none, and transform every channel they are given.
NO_AFFINE: Affine = (None, None, None, None)


def conv3x3_coupling(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    global_scale: Tensor,
    global_offset: Tensor,
    perm: Tensor,
    inverse_perm: Tensor,
    clamp: float,
    form: ClampForm,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """See fastmsflow.reference.conv3x3.conv3x3_coupling. Differentiable by all tensors but the two of int64."""
    # The fused kernel writes as many kept channels as changed ones.
    if not _fuses(hidden, weight, bias, backend) or x.shape[1] > len(weight):
        raw = conv3x3(hidden, weight, bias, backend)
        return unfused.coupling(x, raw, global_scale, global_offset, perm, clamp, form, backend)
    affine = (global_scale, global_offset, perm, inverse_perm)
    return _apply(hidden, weight, bias, affine, (SUBNET_SCALE, clamp, form, None), False, [x])


def conv3x3_cross_coupling(
    hidden: Tensor, weight: Tensor, bias: Tensor, x: Tensor, clamp: float, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """See fastmsflow.reference.conv3x3.conv3x3_cross_coupling. Differentiable by all its tensors."""
    if not _fuses(hidden, weight, bias, backend):
        return unfused.cross_coupling(x, conv3x3(hidden, weight, bias, backend), clamp, backend)
    return _apply(hidden, weight, bias, NO_AFFINE, (1.0, clamp, "atan", None), False, [x])


def conv3x3_joining_cross_coupling(
    hidden: Tensor, weight: Tensor, bias: Tensor, kept: Tensor, x: Tensor, clamp: float, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """See fastmsflow.reference.conv3x3.conv3x3_joining_cross_coupling. Differentiable by all its tensors."""
    if not _fuses(hidden, weight, bias, backend) or kept.shape[1] > x.shape[1]:
        return unfused.joining_cross_coupling(kept, x, conv3x3(hidden, weight, bias, backend), clamp, backend)
    limit = output_limit(x.dtype)
    return _apply(hidden, weight, bias, NO_AFFINE, (1.0, clamp, "atan", limit), False, [kept, x])


def conv3x3_joining_cross_coupling_likelihood(
    hidden: Tensor, weight: Tensor, bias: Tensor, kept: Tensor, x: Tensor, clamp: float, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """See fastmsflow.reference.conv3x3.conv3x3_joining_cross_coupling_likelihood. Differentiable by all its tensors.

    By Triton the latents are never written, forward or backward.
    """
    if not _fuses(hidden, weight, bias, backend) or kept.shape[1] > x.shape[1]:
        raw = conv3x3(hidden, weight, bias, backend)
        return unfused.joining_cross_coupling_likelihood(kept, x, raw, clamp, backend)
    limit = output_limit(x.dtype)
    return _apply(hidden, weight, bias, NO_AFFINE, (1.0, clamp, "atan", limit), True, [kept, x])


def _fuses(hidden: Tensor, weight: Tensor, bias: Tensor, backend: Backend) -> bool:
    check_convolution(hidden, weight, bias)
    return uses_triton_convolution("conv3x3_coupling", backend, hidden, len(weight))


def _apply(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    affine: Affine,
    options: tuple[float, float, str, float | None],
    likelihood: bool,
    parts: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """``affine``, ``options``: what ConvCoupling takes before ``likelihood``."""
    global_scale, global_offset, perm, inverse_perm = affine
    whole = perm is None
    unfused.check_coupling(parts[-1], hidden.shape[0], len(weight), hidden.shape[2:], hidden.device, whole)
    convolution = (*in_autocast_dtype(hidden, weight), bias)
    if records_gradients(*convolution, global_scale, global_offset, *parts):
        return ConvCoupling.apply(*convolution, *affine, *options, likelihood, *parts)
    fixed = (global_scale, global_offset, inverse_perm)
    z, log_det = _conv_coupling(*convolution, parts, *fixed, *options, False, likelihood)
    return z, log_det


class ConvCoupling(torch.autograd.Function):
    """``parts``: x, or its kept and its transformed channels. Where ``likelihood``, the log-likelihood map of z comes
    out in its place."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        global_scale: Tensor | None,
        global_offset: Tensor | None,
        perm: Tensor | None,
        inverse_perm: Tensor | None,
        raw_scale: float,
        clamp: float,
        form: str,
        limit: float | None,
        likelihood: bool,
        *parts: Tensor,
    ) -> tuple[Tensor, Tensor]:
        options = (raw_scale, clamp, form, limit)
        fixed = (global_scale, global_offset, inverse_perm)
        z, log_det, raw = _conv_coupling(hidden, weight, bias, list(parts), *fixed, *options, True, likelihood)
        ctx.options = (*options, False, likelihood)
        ctx.bias_dtype = bias.dtype
        ctx.save_for_backward(hidden, weight, global_scale, global_offset, perm, raw, *parts)
        return z, log_det

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, global_scale, global_offset, perm, raw, *parts = ctx.saved_tensors
        grad_parts, grad_raw, grad_scale, grad_offset = unfused.coupling_gradients(
            grad_z, grad_log_det, parts, raw, global_scale, global_offset, perm, *ctx.options
        )
        grad_hidden, grad_weight = convolution_gradients(grad_raw, hidden, weight, ctx.needs_input_grad[0])
        grad_bias = bias_gradient(grad_raw, ctx.bias_dtype)
        perms_and_options = (None,) * 7
        return grad_hidden, grad_weight, grad_bias, grad_scale, grad_offset, *perms_and_options, *grad_parts


@library.custom_op("fastmsflow::conv3x3_coupling", mutates_args=())
def _conv_coupling(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    parts: list[Tensor],
    global_scale: Tensor | None,
    global_offset: Tensor | None,
    inverse_perm: Tensor | None,
    raw_scale: float,
    clamp: float,
    form: str,
    limit: float | None,
    keep: bool,
    likelihood: bool,
) -> list[Tensor]:
    from ..kernels import conv3x3_coupling as kernels

    return kernels.conv3x3_coupling(
        hidden,
        weight,
        bias,
        parts,
        global_scale,
        global_offset,
        inverse_perm,
        raw_scale,
        clamp,
        form,
        limit,
        precision(hidden),
        keep,
        likelihood,
    )


@_conv_coupling.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    parts: list[Tensor],
    global_scale: Tensor | None,
    global_offset: Tensor | None,
    inverse_perm: Tensor | None,
    raw_scale: float,
    clamp: float,
    form: str,
    limit: float | None,
    keep: bool,
    likelihood: bool,
) -> list[Tensor]:
    raw = [new_rows(hidden, len(weight))] if keep else []
    return [unfused.new_result(parts, likelihood), hidden.new_empty(hidden.shape[0], dtype=torch.float32), *raw]
