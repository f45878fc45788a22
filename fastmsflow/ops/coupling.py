"""Affine couplings: within a level, and across the levels."""

from typing import Any

import torch
from torch import Tensor, library

from ..backend import Backend, uses_triton
from ..errors import InputError
from ..kernels.rows import new_rows
from ..reference import coupling as reference
from ..reference.coupling import SUBNET_SCALE, ClampForm
from ..reference.fusion import output_limit
from . import records_gradients


def coupling(
    x: Tensor,
    raw: Tensor,
    global_scale: Tensor,
    global_offset: Tensor,
    perm: Tensor,
    clamp: float,
    form: ClampForm,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """See fastmsflow.reference.coupling.coupling. Differentiable by x, raw, global_scale and global_offset."""
    _check(x, raw)
    if not uses_triton(backend, x):
        return reference.coupling(x, raw, global_scale, global_offset, perm, clamp, form)
    return _couple(raw, global_scale, global_offset, perm, SUBNET_SCALE, clamp, form, None, False, False, x)


def coupling_inverse(
    z: Tensor,
    raw: Tensor,
    global_scale: Tensor,
    global_offset: Tensor,
    perm: Tensor,
    clamp: float,
    form: ClampForm,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """See fastmsflow.reference.coupling.coupling_inverse. Differentiable by the same."""
    _check(z, raw)
    if not uses_triton(backend, z):
        return reference.coupling_inverse(z, raw, global_scale, global_offset, perm, clamp, form)
    return _couple(raw, global_scale, global_offset, perm, SUBNET_SCALE, clamp, form, None, True, False, z)


def cross_coupling(x: Tensor, raw: Tensor, clamp: float, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """See fastmsflow.reference.coupling.cross_coupling. Differentiable by x and raw."""
    _check(x, raw, whole=True)
    if not uses_triton(backend, x):
        return reference.cross_coupling(x, raw, clamp)
    return _couple(raw, None, None, None, 1.0, clamp, "atan", None, False, False, x)


def cross_coupling_inverse(y: Tensor, raw: Tensor, clamp: float, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """See fastmsflow.reference.coupling.cross_coupling_inverse. Differentiable by y and raw."""
    _check(y, raw, whole=True)
    if not uses_triton(backend, y):
        return reference.cross_coupling_inverse(y, raw, clamp)
    return _couple(raw, None, None, None, 1.0, clamp, "atan", None, True, False, y)


def joining_cross_coupling(
    kept: Tensor, x: Tensor, raw: Tensor, clamp: float, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """See fastmsflow.reference.coupling.joining_cross_coupling. Differentiable by kept, x and raw."""
    _check(x, raw, whole=True)
    if not uses_triton(backend, x):
        return reference.joining_cross_coupling(kept, x, raw, clamp)
    return _couple(raw, None, None, None, 1.0, clamp, "atan", output_limit(x.dtype), False, False, kept, x)


def joining_cross_coupling_likelihood(
    kept: Tensor, x: Tensor, raw: Tensor, clamp: float, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """See fastmsflow.reference.coupling.joining_cross_coupling_likelihood. Differentiable by kept, x and raw.

    By Triton the latents are never written, forward or backward.
    """
    _check(x, raw, whole=True)
    if not uses_triton(backend, x):
        return reference.joining_cross_coupling_likelihood(kept, x, raw, clamp)
    return _couple(raw, None, None, None, 1.0, clamp, "atan", output_limit(x.dtype), False, True, kept, x)


def check_coupling(
    x: Tensor, batch: int, outputs: int, grid: torch.Size, device: torch.device, whole: bool = False
) -> None:
    """``whole``: every channel of x is transformed. Errors: InputError where a subnet's output does not fit x."""
    if x.ndim != 4 or x.shape[0] != batch or x.shape[2:] != grid:
        raise InputError(f"x is {tuple(x.shape)}; the subnet's output has a batch of {batch}, a grid {tuple(grid)}")
    if outputs % 2 or outputs // 2 > x.shape[1]:
        raise InputError(f"the subnet puts out {outputs} channels: two for each of at most {x.shape[1]} in x")
    if whole and outputs != 2 * x.shape[1]:
        raise InputError(f"the subnet puts out {outputs} channels; all {x.shape[1]} of x need two each")
    if device != x.device:
        raise InputError(f"x is on {x.device}, the subnet's output on {device}; move them to one device")


def _check(x: Tensor, raw: Tensor, whole: bool = False) -> None:
    check_coupling(x, raw.shape[0], raw.shape[1], raw.shape[2:], raw.device, whole)


def _couple(
    raw: Tensor,
    global_scale: Tensor | None,
    global_offset: Tensor | None,
    perm: Tensor | None,
    raw_scale: float,
    clamp: float,
    form: str,
    limit: float | None,
    inverse: bool,
    likelihood: bool,
    *parts: Tensor,
) -> tuple[Tensor, Tensor]:
    """Takes and returns what ``Coupling.forward`` does."""
    affine, options = (raw, global_scale, global_offset), (raw_scale, clamp, form, limit, inverse, likelihood)
    if records_gradients(*affine, *parts):
        return Coupling.apply(*affine, perm, *options, *parts)
    return _coupling(list(parts), *affine, perm, *options)


class Coupling(torch.autograd.Function):
    """``parts``: x, or its kept and its transformed channels; where ``inverse``, z. Where ``likelihood``, the
    log-likelihood map of z comes out in its place."""

    @staticmethod
    def forward(
        ctx: Any,
        raw: Tensor,
        global_scale: Tensor | None,
        global_offset: Tensor | None,
        perm: Tensor | None,
        raw_scale: float,
        clamp: float,
        form: str,
        limit: float | None,
        inverse: bool,
        likelihood: bool,
        *parts: Tensor,
    ) -> tuple[Tensor, Tensor]:
        options = (raw_scale, clamp, form, limit, inverse, likelihood)
        out, log_det = _coupling(list(parts), raw, global_scale, global_offset, perm, *options)
        ctx.options = options
        ctx.save_for_backward(raw, global_scale, global_offset, perm, *([out] if inverse else parts))
        return out, log_det

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        raw, global_scale, global_offset, perm, *parts = ctx.saved_tensors
        grad_parts, *grads = coupling_gradients(
            grad_out, grad_log_det, parts, raw, global_scale, global_offset, perm, *ctx.options
        )
        perm_and_options = (None,) * 7
        return *grads, *perm_and_options, *grad_parts


def coupling_gradients(
    grad_out: Tensor,
    grad_log_det: Tensor,
    parts: list[Tensor],
    raw: Tensor,
    global_scale: Tensor | None,
    global_offset: Tensor | None,
    perm: Tensor | None,
    raw_scale: float,
    clamp: float,
    form: str,
    limit: float | None,
    inverse: bool,
    likelihood: bool,
) -> tuple[list[Tensor], Tensor, Tensor | None, Tensor | None]:
    """Gradients of ``parts``, raw, global_scale and global_offset."""
    grads = _coupling_backward(
        grad_out, grad_log_det, parts, raw, global_scale, perm, raw_scale, clamp, form, limit, inverse, likelihood
    )
    grad_parts, grad_raw = grads[: len(parts)], grads[len(parts)]
    if global_scale is None or global_offset is None:
        return grad_parts, grad_raw, None, None
    # log_det holds H W log g of each channel, once an image; inverse, minus that.
    through_log_det = raw.shape[2] * raw.shape[3] * grad_log_det.sum()
    gain = reference.global_gain(global_scale)
    grad_gain = grads[-2] + (-through_log_det if inverse else through_log_det) / gain
    grad_scale = grad_gain * 0.1 * torch.sigmoid(0.5 * global_scale.float())
    return grad_parts, grad_raw, grad_scale.to(global_scale.dtype), grads[-1].to(global_offset.dtype)


@library.custom_op("fastmsflow::coupling", mutates_args=())
def _coupling(
    parts: list[Tensor],
    raw: Tensor,
    global_scale: Tensor | None,
    global_offset: Tensor | None,
    perm: Tensor | None,
    raw_scale: float,
    clamp: float,
    form: str,
    limit: float | None,
    inverse: bool,
    likelihood: bool,
) -> tuple[Tensor, Tensor]:
    from ..kernels import coupling as kernels

    return kernels.coupling(
        parts, raw, global_scale, global_offset, perm, raw_scale, clamp, form, limit, inverse, likelihood
    )


@_coupling.register_fake
def _(
    parts: list[Tensor],
    raw: Tensor,
    global_scale: Tensor | None,
    global_offset: Tensor | None,
    perm: Tensor | None,
    raw_scale: float,
    clamp: float,
    form: str,
    limit: float | None,
    inverse: bool,
    likelihood: bool,
) -> tuple[Tensor, Tensor]:
    return new_result(parts, likelihood), raw.new_empty(raw.shape[0], dtype=torch.float32)


def new_result(parts: list[Tensor], likelihood: bool) -> Tensor:
    """The shape of what a coupling puts out."""
    if likelihood:
        return parts[0].new_empty((parts[0].shape[0], *parts[0].shape[2:]), dtype=torch.float32)
    return new_rows(parts[0], sum(part.shape[1] for part in parts))


@library.custom_op("fastmsflow::coupling_backward", mutates_args=())
def _coupling_backward(
    grad_out: Tensor,
    grad_log_det: Tensor,
    parts: list[Tensor],
    raw: Tensor,
    global_scale: Tensor | None,
    perm: Tensor | None,
    raw_scale: float,
    clamp: float,
    form: str,
    limit: float | None,
    inverse: bool,
    likelihood: bool,
) -> list[Tensor]:
    from ..kernels import coupling as kernels

    return kernels.coupling_backward(
        grad_out, grad_log_det, parts, raw, global_scale, perm, raw_scale, clamp, form, limit, inverse, likelihood
    )


@_coupling_backward.register_fake
def _(
    grad_out: Tensor,
    grad_log_det: Tensor,
    parts: list[Tensor],
    raw: Tensor,
    global_scale: Tensor | None,
    perm: Tensor | None,
    raw_scale: float,
    clamp: float,
    form: str,
    limit: float | None,
    inverse: bool,
    likelihood: bool,
) -> list[Tensor]:
    grads = [new_rows(part, part.shape[1]) for part in [*parts, raw]]
    if global_scale is None:
        return grads
    channels = sum(part.shape[1] for part in parts)
    return [*grads, *(raw.new_empty(channels, dtype=torch.float32) for _ in range(2))]
