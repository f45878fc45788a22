"""Log-likelihood of latents under a standard normal, per pixel; one launch computes all levels."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .channels_last import as_rows, new_rows
from .configs import tile
from .launch import launched, on


@triton.jit
def _tile(z, stride, rows, program, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Returns first row (int64), row offsets, channel offsets, mask of the rows, pointers to the first channels."""
    row = program.to(tl.int64) * BLOCK_P
    p = tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    return row, p, c, row + p < rows, z + row * stride + p[:, None] * stride + c[None, :]


@triton.jit
def log_likelihood_kernel(
    zs,  # per level (rows, stride)
    logps,  # per level (rows,) float32
    rows,  # per level
    channels,  # per level
    strides,  # per level
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """logp = -0.5 mean over channels of z^2, level by level."""
    program = tl.program_id(0)
    for level in tl.static_range(len(zs)):
        programs = tl.cdiv(rows[level], BLOCK_P)
        if (program >= 0) & (program < programs):
            row, p, c, valid, at = _tile(zs[level], strides[level], rows[level], program, BLOCK_P, BLOCK_C)
            total = tl.zeros((BLOCK_P,), tl.float32)
            for first in range(0, channels[level], BLOCK_C):
                mask = valid[:, None] & (first + c < channels[level])[None, :]
                value = tl.load(at + first, mask=mask, other=0.0).to(tl.float32)
                total += tl.sum(value * value, axis=1)
            tl.store(logps[level] + row + p, -0.5 * total / channels[level], mask=valid)
        program -= programs


@triton.jit
def log_likelihood_backward_kernel(
    grad_logps,  # per level (rows,) float32
    zs,  # per level (rows, stride)
    grad_zs,  # per level (rows, channels)
    rows,
    channels,
    strides,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_z = -z grad_logp / channels, level by level."""
    program = tl.program_id(0)
    for level in tl.static_range(len(zs)):
        programs = tl.cdiv(rows[level], BLOCK_P)
        if (program >= 0) & (program < programs):
            row, p, c, valid, at = _tile(zs[level], strides[level], rows[level], program, BLOCK_P, BLOCK_C)
            grad_at = grad_zs[level] + row * channels[level] + p[:, None] * channels[level] + c[None, :]
            factor = -tl.load(grad_logps[level] + row + p, mask=valid, other=0.0)[:, None] / channels[level]
            for first in range(0, channels[level], BLOCK_C):
                mask = valid[:, None] & (first + c < channels[level])[None, :]
                value = tl.load(at + first, mask=mask, other=0.0).to(tl.float32)
                tl.store(grad_at + first, (value * factor).to(grad_zs[level].dtype.element_ty), mask=mask)
        program -= programs


def log_likelihood_maps(z: list[Tensor]) -> list[Tensor]:
    """Launches ``log_likelihood_kernel``: maps (B, H_l, W_l) per level, float32, of z (B, C_l, H_l, W_l)."""
    logps = [torch.empty((level.shape[0], *level.shape[2:]), dtype=torch.float32, device=level.device) for level in z]
    tensors, strides = zip(*(as_rows(level) for level in z), strict=True)
    _launch(log_likelihood_kernel, z, tensors, tuple(logps), strides=strides)
    return logps


def log_likelihood_maps_backward(grad_logps: list[Tensor], z: list[Tensor]) -> list[Tensor]:
    """Launches ``log_likelihood_backward_kernel``: the gradient of z per level, of z's dtype."""
    grads = [new_rows(level, level.shape[1]) for level in z]
    tensors, strides = zip(*(as_rows(level) for level in z), strict=True)
    contiguous = tuple(grad.contiguous() for grad in grad_logps)
    _launch(log_likelihood_backward_kernel, z, contiguous, tensors, tuple(grads), strides=strides)
    return grads


def _launch(kernel: Any, z: list[Tensor], *pointers: tuple[Tensor, ...], strides: tuple[int, ...]) -> None:
    rows = tuple(level.shape[0] * level.shape[2] * level.shape[3] for level in z)
    channels = tuple(level.shape[1] for level in z)
    size = tile("likelihood", z[0].device).within(max(rows), max(channels))
    grid = (sum(triton.cdiv(n, size.pixels) for n in rows),)
    with on(z[0].device):
        launched(kernel)[grid](
            *pointers, rows, channels, strides, BLOCK_P=size.pixels, BLOCK_C=size.channels, **size.options
        )
