"""Affine couplings: within a level, and across the levels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

from ..backend import Backend, uses_triton
from ..errors import InputError
from ..kernels.channels_last import new_results, new_rows
from ..reference import coupling as reference
from ..reference.clamp_forms import find_clamp_form
from ..reference.coupling_spec import CouplingSpec, GlobalAffine, Halves
from . import records_gradients


def coupling(
    x: Halves,
    raw: Tensor,
    bias: Tensor | None = None,
    *,
    spec: CouplingSpec,
    affine: GlobalAffine | None = None,
    backend: Backend = "auto",
) -> tuple[list[Tensor], Tensor | None]:
    """Computes fastmsflow.reference.coupling.coupling. Differentiable by all its tensors but those of int64.

    Raises: InputError if shapes or devices do not fit or the soft clamp's form is not known.
    """
    check_coupling(x, raw, raw.shape[1])
    if not uses_triton(backend, x[1]):
        return reference.coupling(x, raw, bias, spec=spec, affine=affine)
    return launch_coupling(x, raw, bias, spec=spec, affine=affine)


def coupling_inverse(
    z: Tensor, raw: Tensor, *, spec: CouplingSpec, affine: GlobalAffine | None = None, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Computes fastmsflow.reference.coupling.coupling_inverse. Differentiable by all its tensors but those of int64.

    Raises: InputError if shapes or devices do not fit or the soft clamp's form is not known.
    """
    check_coupling((None, z), raw, raw.shape[1] if affine is None else 2 * raw.shape[1])
    if not uses_triton(backend, z):
        return reference.coupling_inverse(z, raw, spec=spec, affine=affine)
    z1, z2 = (None, z) if affine is None else z.chunk(2, dim=1)
    scale, offset, perm, inverse_perm = affine_operands(affine)
    x, log_det = Coupling.apply(
        z1, z2, raw, None, scale, offset, inverse_perm, perm, *spec_operands(spec, z.dtype)[:3], None, True, "concat"
    )
    return x, log_det


def check_coupling(x: Halves, subnet: Tensor, outputs: int) -> None:
    """Checks that the halves x1 and x2 fit each other and the subnet's output.

    ``subnet``: a map on the grid of the subnet's ``outputs`` channels.
    Raises: InputError if shapes or devices differ.
    """
    x1, x2 = x
    batch, grid = subnet.shape[0], tuple(subnet.shape[2:])
    if x2.ndim != 4 or x2.shape[0] != batch or x2.shape[2:] != grid:
        raise InputError(f"x is {tuple(x2.shape)}; the subnet's output has a batch of {batch}, a grid {grid}")
    if outputs != 2 * x2.shape[1]:
        raise InputError(f"the subnet puts out {outputs} channels; all {x2.shape[1]} of x need two each")
    if x1 is not None and x1.shape != x2.shape:
        raise InputError(f"the halves of x are {tuple(x1.shape)} and {tuple(x2.shape)}; they need to be of one shape")
    if subnet.device != x2.device:
        raise InputError(f"x is on {x2.device}, the subnet's output on {subnet.device}; move them to one device")


def launch_coupling(
    x: Halves, raw: Tensor, bias: Tensor | None, *, spec: CouplingSpec, affine: GlobalAffine | None
) -> tuple[list[Tensor], Tensor | None]:
    """Computes ``coupling`` by the Triton kernel; the arguments have been checked."""
    settings = (*spec_operands(spec, x[1].dtype), False, spec.result)
    tensors = (*x, raw, bias, *affine_operands(affine))
    if records_gradients(*tensors):
        *results, log_det = Coupling.apply(*tensors, *settings)
        return results, log_det if spec.with_log_det else None
    found = _coupling(*tensors[:-1], *settings, spec.with_log_det)
    return (found[:-1], found[-1]) if spec.with_log_det else (found, None)


def spec_operands(spec: CouplingSpec, dtype: torch.dtype) -> tuple[float, float, str, float | None]:
    """Returns raw_scale, clamp, form and limit, as the operators take them, for x of ``dtype``.

    Raises: InputError if the soft clamp's form is not known.
    """
    find_clamp_form(spec.form)
    return spec.raw_scale, spec.clamp, spec.form, spec.limit(dtype)


def affine_operands(affine: GlobalAffine | None) -> tuple[Tensor | None, ...]:
    """Returns global scale and offset, permutation and its inverse, as the operators take them."""
    if affine is None:
        return None, None, None, None
    return affine.scale, affine.offset, affine.perm, affine.inverse_perm


class Coupling(torch.autograd.Function):
    """Differentiates ``_coupling``, whose operands it takes, with the index's inverse behind the index."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> tuple[Tensor, ...]:
        x1, x2, raw, bias, global_scale, global_offset, index, inverse_index, *settings = operands
        results = _coupling(x1, x2, raw, bias, global_scale, global_offset, index, *settings, True)
        ctx.settings = settings
        *_, inverse, _result = settings
        ctx.has_both_halves = inverse and x1 is not None
        halves = (None, results[0]) if inverse else (x1, x2)
        ctx.save_for_backward(*halves, raw, bias, global_scale, global_offset, inverse_index)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x1, x2, raw, bias, *affine = ctx.saved_tensors
        if ctx.has_both_halves:
            x1, x2 = x2.chunk(2, dim=1)
        *found, grad_bias, grad_scale, grad_offset = coupling_gradients(
            grads, (x1, x2, raw, bias), affine, ctx.settings
        )
        cast_grad_bias = None if bias is None else grad_bias.to(bias.dtype)
        indices_and_settings = (None,) * 8
        return *found, cast_grad_bias, grad_scale, grad_offset, *indices_and_settings


def coupling_gradients(
    grads: Sequence[Tensor],
    tensors: tuple[Tensor | None, Tensor, Tensor, Tensor | None],
    affine: Sequence[Tensor | None],
    settings: Sequence[Any],
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Computes the gradients of x1, x2, raw, bias (float32, also if it is part of raw), global_scale, global_offset.

    ``grads``: the gradients of the results, then of the log_det. ``tensors``: x1, x2, raw and bias. ``affine``: global
    scale, global offset and the inverse index. ``settings``: raw_scale, clamp, form, limit, inverse and result.
    """
    *grad_results, grad_log_det = grads
    global_scale, global_offset, index = affine
    raw = tensors[2]
    found = _coupling_backward(grad_results, grad_log_det, *tensors, global_scale, index, *settings)
    *grad_x1, grad_x2, grad_raw, sums = found
    grad_x = (grad_x1[0] if grad_x1 else None, grad_x2)
    if global_scale is None or global_offset is None:
        return *grad_x, grad_raw, sums, None, None
    grad_gain, grad_offset, grad_bias = sums.split(raw.shape[1])
    # log_det holds H W log g of each channel, once an image; inverse, minus that.
    through_log_det = raw.shape[2] * raw.shape[3] * grad_log_det.sum()
    inverse = settings[4]
    gain = reference.global_gain(global_scale)
    grad_gain = grad_gain + (-through_log_det if inverse else through_log_det) / gain
    grad_scale = grad_gain * 0.1 * torch.sigmoid(0.5 * global_scale.float())
    return *grad_x, grad_raw, grad_bias, grad_scale.to(global_scale.dtype), grad_offset.to(global_offset.dtype)


@library.custom_op("fastmsflow::coupling", mutates_args=())
def _coupling(
    x1: Tensor | None,
    x2: Tensor,
    raw: Tensor | None,
    bias: Tensor | None,
    global_scale: Tensor | None,
    global_offset: Tensor | None,
    index: Tensor | None,
    raw_scale: float,
    clamp: float,
    form: str,
    limit: float | None,
    inverse: bool,
    result: str,
    with_log_det: bool,
) -> list[Tensor]:
    from ..kernels import coupling as kernels

    return kernels.coupling(
        x1, x2, raw, bias, global_scale=global_scale, global_offset=global_offset, index=index,
        raw_scale=raw_scale, clamp=clamp, form=find_clamp_form(form).kernel_constant, limit=limit,
        inverse=inverse, result=result, with_log_det=with_log_det,
    )  # fmt: skip


@_coupling.register_fake
def _(x1: Tensor | None, x2: Tensor, *operands: Any) -> list[Tensor]:
    *_, result, with_log_det = operands
    log_det = [x2.new_empty(x2.shape[0], dtype=torch.float32)] if with_log_det else []
    return [*new_results(x1, x2, result), *log_det]


@library.custom_op("fastmsflow::coupling_backward", mutates_args=())
def _coupling_backward(
    grads: list[Tensor],
    grad_log_det: Tensor,
    x1: Tensor | None,
    x2: Tensor,
    raw: Tensor,
    bias: Tensor | None,
    global_scale: Tensor | None,
    index: Tensor | None,
    raw_scale: float,
    clamp: float,
    form: str,
    limit: float | None,
    inverse: bool,
    result: str,
) -> list[Tensor]:
    from ..kernels import coupling as kernels

    return kernels.coupling_backward(
        grads, grad_log_det, x1, x2, raw=raw, bias=bias, global_scale=global_scale, index=index,
        raw_scale=raw_scale, clamp=clamp, form=find_clamp_form(form).kernel_constant, limit=limit,
        inverse=inverse, result=result,
    )  # fmt: skip


@_coupling_backward.register_fake
def _(grads: list[Tensor], grad_log_det: Tensor, x1: Tensor | None, x2: Tensor, *operands: Any) -> list[Tensor]:
    raw, _, global_scale, *_ = operands
    grad_x = [new_rows(half, half.shape[1]) for half in (x1, x2) if half is not None]
    channels = raw.shape[1]
    sums = channels if global_scale is None else 3 * channels
    return [*grad_x, new_rows(raw, channels), raw.new_empty(sums, dtype=torch.float32)]
