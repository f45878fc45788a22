"""3x3 convolution and the coupling that its outputs drive: the second half of a subnet, and what follows it."""

from typing import Any

import torch
from torch import Tensor, library

from ..backend import Backend, uses_triton
from ..kernels.channels_last import new_results, new_rows
from ..reference.clamp_forms import find_clamp_form
from ..reference.coupling_spec import CouplingSpec, GlobalAffine, Halves
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


def conv3x3_coupling(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    x: Halves,
    *,
    spec: CouplingSpec,
    affine: GlobalAffine | None = None,
    backend: Backend = "auto",
) -> tuple[list[Tensor], Tensor | None]:
    """Computes fastmsflow.reference.conv3x3_coupling.conv3x3_coupling.

    Differentiable by all its tensors but those of int64. By Triton, the latents whose likelihood is the result are
    never written, forward or backward.
    Raises: InputError if shapes, dtypes or devices do not fit or the soft clamp's form is not known.
    """
    if not uses_triton(backend, hidden):
        raw = conv3x3(hidden, weight, bias, backend)
        return unfused.coupling(x, raw, spec=spec, affine=affine, backend=backend)
    check_convolution(hidden, weight, bias)
    unfused.check_coupling(x, hidden, len(weight))
    if not uses_triton_convolution("conv3x3_coupling", backend, hidden, len(weight)):
        # The coupling, which reads the convolution's output anyway, adds the bias: the vendor's would in a pass more.
        raw = conv3x3(hidden, weight, None, backend)
        return unfused.launch_coupling(x, raw, bias, spec=spec, affine=affine)
    settings = (*unfused.spec_operands(spec, x[1].dtype), spec.result)
    tensors = (*in_autocast_dtype(hidden, weight), bias, *x, *unfused.affine_operands(affine))
    if records_gradients(*tensors):
        *results, log_det = ConvCoupling.apply(*tensors, *settings)
        return results, log_det if spec.with_log_det else None
    *results, log_det, _ = _fused(tensors, settings, spec.with_log_det, with_raw=False)
    return results, log_det


def _fused(
    tensors: tuple[Any, ...], settings: tuple[Any, ...], with_log_det: bool, *, with_raw: bool
) -> tuple[Any, ...]:
    """Returns the results, log_det and the convolution's output, None for each of the last two that is not wanted.

    ``tensors``: hidden, weight, bias, x1, x2, global scale and offset, permutation and its inverse. ``settings``:
    raw_scale, clamp, form, limit and result.
    """
    *convolution, x1, x2, global_scale, global_offset, perm, _ = tensors
    *coupling_settings, result = settings
    if perm is None:
        out, *more = _conv_coupling(*convolution, x1, x2, *settings, with_log_det, with_raw)
        return out, more[0] if with_log_det else None, more[-1] if with_raw else None
    # The convolution's kernel permutes nothing: the coupling's kernel does, in a pass of its own.
    out, *more = _conv_coupling(*convolution, None, x2, *coupling_settings, "concat", with_log_det, with_raw)
    permutation = (global_scale, global_offset, perm, *coupling_settings, False, result, with_log_det)
    results = unfused._coupling(x1, out, None, None, *permutation)
    raw = more[-1] if with_raw else None
    if not with_log_det:
        return *results, None, raw
    return *results[:-1], more[0] + results[-1], raw


class ConvCoupling(torch.autograd.Function):
    """Differentiates ``_fused``, whose tensors and settings it takes.

    The convolution's output is computed once and saved for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> tuple[Tensor, ...]:
        tensors, settings = operands[:9], operands[9:]
        hidden, weight, bias, x1, x2, global_scale, global_offset, _perm, inverse_perm = tensors
        *results, raw = _fused(tensors, settings, True, with_raw=True)
        *coupling_settings, result = settings
        ctx.settings = (*coupling_settings, False, result)
        ctx.bias_dtype = bias.dtype
        ctx.save_for_backward(hidden, weight, x1, x2, raw, global_scale, global_offset, inverse_perm)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, x1, x2, raw, *affine = ctx.saved_tensors
        grad_x1, grad_x2, grad_raw, grad_bias, *grad_affine = unfused.coupling_gradients(
            grads, (x1, x2, raw, None), affine, ctx.settings
        )
        grad_weights = convolution_gradients(grad_raw, hidden, weight, ctx.needs_input_grad[0])
        perms_and_settings = (None,) * 7
        return *grad_weights, grad_bias.to(ctx.bias_dtype), grad_x1, grad_x2, *grad_affine, *perms_and_settings


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

    return kernels.conv3x3_coupling(
        hidden, weight, bias, x1=x1, x2=x2, raw_scale=raw_scale, clamp=clamp,
        form=find_clamp_form(form).kernel_constant, limit=limit, precision=precision(hidden), result=result,
        with_log_det=with_log_det, with_raw=with_raw,
    )  # fmt: skip


@_conv_coupling.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor, x1: Tensor | None, x2: Tensor, *operands: Any) -> list[Tensor]:
    *_, result, with_log_det, with_raw = operands
    log_det = [hidden.new_empty(hidden.shape[0], dtype=torch.float32)] if with_log_det else []
    raw = [new_rows(hidden, len(weight))] if with_raw else []
    return [*new_results(x1, x2, result), *log_det, *raw]
