"""3x3 convolution and the coupling that its outputs drive: the second half of a subnet, and what follows it."""

from typing import Any

import torch
from torch import Tensor, library

from ..backend import Backend, uses_triton
from ..kernels.channels_last import new_results, new_rows
from ..reference import conv3x3 as reference
from ..reference.coupling import SUBNET_SCALE, ClampForm
from ..reference.fusion import output_limit
from . import coupling as unfused
from . import records_gradients
from .conv3x3 import (
    check_convolution,
    conv3x3,
    convolution_gradients,
    in_autocast_dtype,
    precision,
    uses_triton_convolution,
)
from .coupling import NO_AFFINE, Affine, Options


def conv3x3_coupling(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    x1: Tensor,
    x2: Tensor,
    global_scale: Tensor,
    global_offset: Tensor,
    perm: Tensor,
    inverse_perm: Tensor,
    clamp: float,
    form: ClampForm,
    with_log_det: bool = True,
    whole: bool = False,
    backend: Backend = "auto",
) -> tuple[list[Tensor], Tensor | None]:
    """See fastmsflow.reference.conv3x3.conv3x3_coupling. Differentiable by all tensors but the two of int64.

    ``whole``: z comes as [z], (B, C, H, W), in place of its halves.
    """
    affine = (global_scale, global_offset, perm, inverse_perm)
    if not uses_triton(backend, hidden):
        raw = conv3x3(hidden, weight, bias, backend)
        return unfused.coupling(x1, x2, raw, None, *affine, clamp, form, with_log_det, whole, backend)
    options, result = (SUBNET_SCALE, clamp, form, None), "whole" if whole else "halves"
    return _convolve_and_couple(hidden, weight, bias, x1, x2, affine, options, result, with_log_det, backend)


def conv3x3_fusion_coupling(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    clamp: float,
    with_log_det: bool = True,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """See fastmsflow.reference.conv3x3.conv3x3_fusion_coupling. Differentiable by all its tensors."""
    if not uses_triton(backend, hidden):
        return reference.conv3x3_fusion_coupling(hidden, weight, bias, x, clamp, with_log_det)
    options = (1.0, clamp, "atan", None)
    (y,), log_det = _convolve_and_couple(
        hidden, weight, bias, None, x, NO_AFFINE, options, "whole", with_log_det, backend
    )
    return y, log_det


def conv3x3_fusion_coupling_concat(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    x1: Tensor,
    x2: Tensor,
    clamp: float,
    with_log_det: bool = True,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """See fastmsflow.reference.conv3x3.conv3x3_fusion_coupling_concat. Differentiable by all its tensors."""
    if not uses_triton(backend, hidden):
        return reference.conv3x3_fusion_coupling_concat(hidden, weight, bias, x1, x2, clamp, with_log_det)
    options = (1.0, clamp, "atan", output_limit(x2.dtype))
    (z,), log_det = _convolve_and_couple(
        hidden, weight, bias, x1, x2, NO_AFFINE, options, "whole", with_log_det, backend
    )
    return z, log_det


def conv3x3_fusion_coupling_concat_likelihood(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    x1: Tensor,
    x2: Tensor,
    clamp: float,
    with_log_det: bool = True,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """See fastmsflow.reference.conv3x3.conv3x3_fusion_coupling_concat_likelihood. Differentiable by all its tensors.

    By Triton the latents are never written, forward or backward.
    """
    if not uses_triton(backend, hidden):
        return reference.conv3x3_fusion_coupling_concat_likelihood(hidden, weight, bias, x1, x2, clamp, with_log_det)
    options = (1.0, clamp, "atan", output_limit(x2.dtype))
    (logp,), log_det = _convolve_and_couple(
        hidden, weight, bias, x1, x2, NO_AFFINE, options, "likelihood", with_log_det, backend
    )
    return logp, log_det


def _convolve_and_couple(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    x1: Tensor | None,
    x2: Tensor,
    affine: Affine,
    options: Options,
    result: str,
    with_log_det: bool,
    backend: Backend,
) -> tuple[list[Tensor], Tensor | None]:
    """Returns what fastmsflow.ops.coupling.couple does, by one kernel or by the vendor's convolution and another."""
    check_convolution(hidden, weight, bias)
    unfused.check_coupling(x1, x2, hidden, len(weight))
    if not uses_triton_convolution("conv3x3_coupling", backend, hidden, len(weight)):
        # The coupling, which reads the convolution's output anyway, adds the bias: the vendor's would in a pass more.
        raw = conv3x3(hidden, weight, None, backend)
        return unfused.couple(x1, x2, raw, bias, affine, options, result, with_log_det)
    convolution = (*in_autocast_dtype(hidden, weight), bias)
    if records_gradients(*convolution, x1, x2, *affine[:2]):
        *results, log_det = ConvCoupling.apply(*convolution, x1, x2, *affine, *options, result)
        return results, log_det if with_log_det else None
    *results, log_det, _ = _fused(convolution, x1, x2, affine, options, result, with_log_det, False)
    return results, log_det


def _fused(
    convolution: tuple[Tensor, Tensor, Tensor],
    x1: Tensor | None,
    x2: Tensor,
    affine: Affine,
    options: Options,
    result: str,
    with_log_det: bool,
    with_raw: bool,
) -> tuple[Any, ...]:
    """-> the results, log_det and the convolution, None each where it is not wanted."""
    global_scale, global_offset, perm, _ = affine
    within_level = perm is not None
    first, wanted = (None, "whole") if within_level else (x1, result)
    out, *more = _conv_coupling(*convolution, first, x2, *options, wanted, with_log_det, with_raw)
    log_det, raw = more[0] if with_log_det else None, more[-1] if with_raw else None
    if not within_level:
        return out, log_det, raw
    permutation = (global_scale, global_offset, perm, *options, False, result, with_log_det)
    results = unfused._coupling(x1, out, None, None, *permutation)
    if log_det is None:
        return *results, None, raw
    return *results[:-1], log_det + results[-1], raw


class ConvCoupling(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        x1: Tensor | None,
        x2: Tensor,
        global_scale: Tensor | None,
        global_offset: Tensor | None,
        perm: Tensor | None,
        inverse_perm: Tensor | None,
        raw_scale: float,
        clamp: float,
        form: str,
        limit: float | None,
        result: str,
    ) -> tuple[Tensor, ...]:
        affine, options = (global_scale, global_offset, perm, inverse_perm), (raw_scale, clamp, form, limit)
        *results, raw = _fused((hidden, weight, bias), x1, x2, affine, options, result, True, True)
        ctx.options = (*options, False, result)
        ctx.bias_dtype = bias.dtype
        ctx.save_for_backward(hidden, weight, x1, x2, global_scale, global_offset, inverse_perm, raw)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, x1, x2, global_scale, global_offset, inverse_perm, raw = ctx.saved_tensors
        affine = (global_scale, global_offset, inverse_perm)
        grad_x1, grad_x2, grad_raw, grad_bias, grad_scale, grad_offset = unfused.coupling_gradients(
            grads, x1, x2, raw, None, affine, *ctx.options
        )
        grad_hidden, grad_weight = convolution_gradients(grad_raw, hidden, weight, ctx.needs_input_grad[0])
        perms_and_options = (None,) * 7
        return (
            grad_hidden, grad_weight, grad_bias.to(ctx.bias_dtype), grad_x1, grad_x2, grad_scale, grad_offset,
            *perms_and_options,
        )  # fmt: skip


@library.custom_op("fastmsflow::conv3x3_coupling", mutates_args=())
def _conv_coupling(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    x1: Tensor | None,
    x2: Tensor,
    raw_scale: float,
    clamp: float,
    form: str,
    limit: float | None,
    result: str,
    with_log_det: bool,
    with_raw: bool,
) -> list[Tensor]:
    from ..kernels import conv3x3_coupling as kernels

    options = (raw_scale, clamp, form, limit, precision(hidden), result, with_log_det, with_raw)
    return kernels.conv3x3_coupling(hidden, weight, bias, x1, x2, *options)


@_conv_coupling.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    x1: Tensor | None,
    x2: Tensor,
    raw_scale: float,
    clamp: float,
    form: str,
    limit: float | None,
    result: str,
    with_log_det: bool,
    with_raw: bool,
) -> list[Tensor]:
    log_det = [hidden.new_empty(hidden.shape[0], dtype=torch.float32)] if with_log_det else []
    raw = [new_rows(hidden, len(weight))] if with_raw else []
    return [*new_results(x1, x2, result), *log_det, *raw]
