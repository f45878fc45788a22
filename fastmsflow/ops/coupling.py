"""Affine couplings: within a level, and across the levels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

from ..backend import Backend, uses_triton
from ..errors import InputError
from ..kernels.channels_last import new_results, new_rows
from ..reference import coupling as reference
from ..reference.coupling import SUBNET_SCALE, ClampForm
from ..reference.fusion import output_limit
from . import records_gradients

# Global scale and offset, permutation and its inverse. Couplings across levels have none.
Affine = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
NO_AFFINE: Affine = (None, None, None, None)
# raw_scale, clamp, form and limit, as the kernels take them.
Options = tuple[float, float, str, float | None]


def coupling(
    x1: Tensor,
    x2: Tensor,
    raw: Tensor,
    bias: Tensor | None,
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
    """See fastmsflow.reference.coupling.coupling. Differentiable by x1, x2, raw, bias, global_scale and global_offset.

    ``whole``: z comes as [z], (B, C, H, W), in place of its halves.
    """
    check_coupling(x1, x2, raw, raw.shape[1])
    affine = (global_scale, global_offset, perm, inverse_perm)
    if not uses_triton(backend, x2):
        z, log_det = reference.coupling(x1, x2, raw, bias, *affine, clamp, form, with_log_det)
        return [torch.cat(z, dim=1)] if whole else z, log_det
    options, result = (SUBNET_SCALE, clamp, form, None), "whole" if whole else "halves"
    return couple(x1, x2, raw, bias, affine, options, result, with_log_det)


def coupling_inverse(
    z: Tensor,
    raw: Tensor,
    global_scale: Tensor,
    global_offset: Tensor,
    perm: Tensor,
    inverse_perm: Tensor,
    clamp: float,
    form: ClampForm,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """See fastmsflow.reference.coupling.coupling_inverse. Differentiable by z, raw, global_scale and global_offset."""
    check_coupling(None, z, raw, 2 * raw.shape[1])
    affine = (global_scale, global_offset, perm, inverse_perm)
    if not uses_triton(backend, z):
        return reference.coupling_inverse(z, raw, *affine, clamp, form)
    z1, z2 = z.chunk(2, dim=1)
    return _invert(z1, z2, raw, affine, (SUBNET_SCALE, clamp, form, None))


def fusion_coupling(
    x: Tensor, raw: Tensor, bias: Tensor | None, clamp: float, with_log_det: bool = True, backend: Backend = "auto"
) -> tuple[Tensor, Tensor | None]:
    """See fastmsflow.reference.coupling.fusion_coupling. Differentiable by x, raw and bias."""
    check_coupling(None, x, raw, raw.shape[1])
    if not uses_triton(backend, x):
        return reference.fusion_coupling(x, raw, bias, clamp, with_log_det)
    (y,), log_det = couple(None, x, raw, bias, NO_AFFINE, (1.0, clamp, "atan", None), "whole", with_log_det)
    return y, log_det


def fusion_coupling_inverse(y: Tensor, raw: Tensor, clamp: float, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """See fastmsflow.reference.coupling.fusion_coupling_inverse. Differentiable by y and raw."""
    check_coupling(None, y, raw, raw.shape[1])
    if not uses_triton(backend, y):
        return reference.fusion_coupling_inverse(y, raw, clamp)
    return _invert(None, y, raw, NO_AFFINE, (1.0, clamp, "atan", None))


def fusion_coupling_concat(
    x1: Tensor,
    x2: Tensor,
    raw: Tensor,
    bias: Tensor | None,
    clamp: float,
    with_log_det: bool = True,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """See fastmsflow.reference.coupling.fusion_coupling_concat. Differentiable by x1, x2, raw and bias."""
    check_coupling(x1, x2, raw, raw.shape[1])
    if not uses_triton(backend, x2):
        return reference.fusion_coupling_concat(x1, x2, raw, bias, clamp, with_log_det)
    options = (1.0, clamp, "atan", output_limit(x2.dtype))
    (z,), log_det = couple(x1, x2, raw, bias, NO_AFFINE, options, "whole", with_log_det)
    return z, log_det


def fusion_coupling_concat_likelihood(
    x1: Tensor,
    x2: Tensor,
    raw: Tensor,
    bias: Tensor | None,
    clamp: float,
    with_log_det: bool = True,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """See fastmsflow.reference.coupling.fusion_coupling_concat_likelihood. Differentiable by x1, x2, raw and bias.

    By Triton the latents are never written, forward or backward.
    """
    check_coupling(x1, x2, raw, raw.shape[1])
    if not uses_triton(backend, x2):
        return reference.fusion_coupling_concat_likelihood(x1, x2, raw, bias, clamp, with_log_det)
    options = (1.0, clamp, "atan", output_limit(x2.dtype))
    (logp,), log_det = couple(x1, x2, raw, bias, NO_AFFINE, options, "likelihood", with_log_det)
    return logp, log_det


def check_coupling(x1: Tensor | None, x2: Tensor, subnet: Tensor, outputs: int) -> None:
    """``subnet``: a map on the grid of the subnet's ``outputs`` channels. Errors: InputError where they do not fit the
    halves x1 and x2, or these each other."""
    batch, grid = subnet.shape[0], tuple(subnet.shape[2:])
    if x2.ndim != 4 or x2.shape[0] != batch or x2.shape[2:] != grid:
        raise InputError(f"x is {tuple(x2.shape)}; the subnet's output has a batch of {batch}, a grid {grid}")
    if outputs != 2 * x2.shape[1]:
        raise InputError(f"the subnet puts out {outputs} channels; all {x2.shape[1]} of x need two each")
    if x1 is not None and x1.shape != x2.shape:
        raise InputError(f"the halves of x are {tuple(x1.shape)} and {tuple(x2.shape)}; they need to be of one shape")
    if subnet.device != x2.device:
        raise InputError(f"x is on {x2.device}, the subnet's output on {subnet.device}; move them to one device")


def couple(
    x1: Tensor | None,
    x2: Tensor,
    raw: Tensor | None,
    bias: Tensor | None,
    affine: Affine,
    options: Options,
    result: str,
    with_log_det: bool,
) -> tuple[list[Tensor], Tensor | None]:
    """Runs the kernel forward; fastmsflow.kernels.coupling.coupling explains its arguments."""
    global_scale, global_offset, perm, _ = affine
    if records_gradients(x1, x2, raw, bias, global_scale, global_offset):
        *outputs, log_det = Coupling.apply(x1, x2, raw, bias, *affine, *options, False, result)
        return outputs, log_det if with_log_det else None
    fixed = (global_scale, global_offset, perm)
    results = _coupling(x1, x2, raw, bias, *fixed, *options, False, result, with_log_det)
    return (results[:-1], results[-1]) if with_log_det else (results, None)


def _invert(z1: Tensor | None, z2: Tensor, raw: Tensor, affine: Affine, options: Options) -> tuple[Tensor, Tensor]:
    global_scale, global_offset, perm, inverse_perm = affine
    turned = (global_scale, global_offset, inverse_perm, perm)
    x, log_det = Coupling.apply(z1, z2, raw, None, *turned, *options, True, "whole")
    return x, log_det


class Coupling(torch.autograd.Function):
    """``index`` and ``inverse_index``: see fastmsflow.kernels.coupling.coupling and coupling_backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x1: Tensor | None,
        x2: Tensor,
        raw: Tensor,
        bias: Tensor | None,
        global_scale: Tensor | None,
        global_offset: Tensor | None,
        index: Tensor | None,
        inverse_index: Tensor | None,
        raw_scale: float,
        clamp: float,
        form: str,
        limit: float | None,
        inverse: bool,
        result: str,
    ) -> tuple[Tensor, ...]:
        options = (raw_scale, clamp, form, limit, inverse, result)
        affine = (global_scale, global_offset, index)
        results = _coupling(x1, x2, raw, bias, *affine, *options, True)
        ctx.options = options
        ctx.joined = inverse and x1 is not None
        halves = (None, results[0]) if inverse else (x1, x2)
        ctx.save_for_backward(*halves, raw, bias, global_scale, global_offset, inverse_index)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x1, x2, raw, bias, global_scale, global_offset, inverse_index = ctx.saved_tensors
        if ctx.joined:
            x1, x2 = x2.chunk(2, dim=1)
        affine = (global_scale, global_offset, inverse_index)
        found = coupling_gradients(grads, x1, x2, raw, bias, affine, *ctx.options)
        grad_x1, grad_x2, grad_raw, grad_bias, grad_scale, grad_offset = found
        of_bias = None if bias is None else grad_bias.to(bias.dtype)
        indices_and_options = (None,) * 8
        return grad_x1, grad_x2, grad_raw, of_bias, grad_scale, grad_offset, *indices_and_options


def coupling_gradients(
    grads: Sequence[Tensor],
    x1: Tensor | None,
    x2: Tensor,
    raw: Tensor,
    bias: Tensor | None,
    affine: tuple[Tensor | None, Tensor | None, Tensor | None],
    raw_scale: float,
    clamp: float,
    form: str,
    limit: float | None,
    inverse: bool,
    result: str,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x1, x2, raw, bias (float32, also where it is part of raw), global_scale and global_offset.

    ``grads``: of what comes out, then of the log_det. ``affine``: global scale and offset and the inverse index.
    """
    global_scale, global_offset, index = affine
    *grad_results, grad_log_det = grads
    options = (raw_scale, clamp, form, limit, inverse, result)
    found = _coupling_backward(grad_results, grad_log_det, x1, x2, raw, bias, global_scale, index, *options)
    first, (grad_x2, grad_raw, sums) = found[:-3], found[-3:]
    grad_x1 = first[0] if first else None
    channels = raw.shape[1]
    if global_scale is None or global_offset is None:
        return grad_x1, grad_x2, grad_raw, sums, None, None
    grad_gain, grad_offset, grad_bias = sums.split(channels)
    # log_det holds H W log g of each channel, once an image; inverse, minus that.
    through_log_det = raw.shape[2] * raw.shape[3] * grad_log_det.sum()
    gain = reference.global_gain(global_scale)
    grad_gain = grad_gain + (-through_log_det if inverse else through_log_det) / gain
    grad_scale = grad_gain * 0.1 * torch.sigmoid(0.5 * global_scale.float())
    return (
        grad_x1, grad_x2, grad_raw, grad_bias, grad_scale.to(global_scale.dtype), grad_offset.to(global_offset.dtype)
    )  # fmt: skip


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

    options = (raw_scale, clamp, form, limit, inverse, result, with_log_det)
    return kernels.coupling(x1, x2, raw, bias, global_scale, global_offset, index, *options)


@_coupling.register_fake
def _(
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

    options = (raw_scale, clamp, form, limit, inverse, result)
    return kernels.coupling_backward(grads, grad_log_det, x1, x2, raw, bias, global_scale, index, *options)


@_coupling_backward.register_fake
def _(
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
    of_x = [new_rows(half, half.shape[1]) for half in (x1, x2) if half is not None]
    channels = raw.shape[1]
    sums = channels if global_scale is None else 3 * channels
    return [*of_x, new_rows(raw, channels), raw.new_empty(sums, dtype=torch.float32)]
