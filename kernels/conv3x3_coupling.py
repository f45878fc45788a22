"""3x3 convolution, then the coupling that its outputs drive, in one pass: log-scales and shifts stay in registers.

A program computes the pairs (s, t) of a tile of pixels and of x2's channels, as neighboring columns of one product,
then couples those channels and bounds as many of x1's, if there is an x1. It permutes nothing: a program has no whole
rows, so it would write single channels; ``coupling`` without a subnet's output permutes, in a pass of its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .channels_last import as_rows, new_results, new_rows
from .configs import product_tile
from .conv3x3 import convolve, exact, image_tile, weight_rows
from .coupling import NO_ROWS
from .launch import launched, on
from .math import soft_clamp


@triton.jit
def _finish(v, limit, out, squares, row, m, c, out_stride, mask):
    """Bounds v, stores it if there is a place for it, and returns squares plus the sum of its squares."""
    if limit is not None:
        v = tl.where(v > limit, limit, tl.where(v < -limit, -limit, v))
    if out is not None:
        at = out + row * out_stride + m[:, None] * out_stride + c[None, :]
        tl.store(at, v.to(out.dtype.element_ty), mask=mask)
    return squares + tl.sum(tl.where(mask, v * v, 0.0), axis=1)


@triton.jit
def conv3x3_coupling_kernel(
    inputs,  # (rows, stride)
    weight,  # outputs: ``half`` log-scales, then as many shifts
    bias,  # (2 half,)
    x1,  # (rows, x1_stride); or None
    x2,  # (rows, x2_stride)
    out1,  # (rows, out_stride): x1, bounded; or None
    out2,  # (rows, out_stride): the transformed x2; or None
    raw,  # (rows, 2 half): the convolution; or None
    partial,  # (programs of dimension 0, programs of dimension 1) float32: log-det; or None
    logp,  # (rows, programs of dimension 1) float32: shares of -0.5 mean over channels of z^2; or None
    height,
    width,
    channels,
    half,
    stride,
    x1_stride,
    x2_stride,
    out_stride,
    weight_out,
    weight_tap,
    raw_scale,
    clamp,
    limit,
    FORM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """z = concat(x1, x2 exp(s) + t), bounded to +-limit, with (s, t) from conv3x3(inputs, weight) + bias; its log-det.

    s = soft_clamp(raw_scale raw_s); t = raw_scale raw_t. Instead of z, -0.5 mean over channels of z^2 can be written.
    """
    _, row, m, y, x, valid = image_tile(tl.program_id(0), height, width, BLOCK_M)
    PAIRS: tl.constexpr = BLOCK_N // 2
    column = tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * PAIRS + column // 2
    # Columns whose channel is out of range must not read another channel's shift.
    output = tl.where(c < half, c + (column % 2) * half, 2 * half)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = convolve(
        acc, None, inputs, weight, output, None, 2 * half, row, m, y, x, valid, height, width, channels, stride,
        1, weight_out, weight_tap, False, PRECISION, BLOCK_K,
    )  # fmt: skip
    raw_s, t = tl.split(tl.reshape(acc, (BLOCK_M, PAIRS, 2)))
    c = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    mask = valid[:, None] & (c < half)[None, :]
    raw_s += tl.load(bias + c, mask=c < half, other=0.0).to(tl.float32)[None, :]
    t += tl.load(bias + half + c, mask=c < half, other=0.0).to(tl.float32)[None, :]
    if raw is not None:
        at = raw + row * 2 * half + m[:, None] * 2 * half + c[None, :]
        tl.store(at, raw_s.to(raw.dtype.element_ty), mask=mask)
        tl.store(at + half, t.to(raw.dtype.element_ty), mask=mask)
    s, _ = soft_clamp(raw_s * raw_scale, clamp, FORM)
    if partial is not None:
        log_det = tl.sum(tl.where(mask, s, 0.0))
        tl.store(partial + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), log_det)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    v = tl.load(x2 + row * x2_stride + m[:, None] * x2_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
    squares = _finish(v * tl.exp(s) + t * raw_scale, limit, out2, squares, row, m, c, out_stride, mask)
    if x1 is not None:
        v = tl.load(x1 + row * x1_stride + m[:, None] * x1_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
        squares = _finish(v, limit, out1, squares, row, m, c, out_stride, mask)
    if logp is not None:
        at = logp + (row + m) * tl.num_programs(1) + tl.program_id(1)
        tl.store(at, -0.25 * squares / half, mask=valid)


def conv3x3_coupling(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    x1: Tensor | None,
    x2: Tensor,
    raw_scale: float,
    clamp: float,
    form: int,
    limit: float | None,
    precision: str,
    result: str,
    with_log_det: bool,
    with_raw: bool,
) -> list[Tensor]:
    """Launches ``conv3x3_coupling_kernel``: a convolution and the coupling that it drives, without affine, permutation.

    hidden (B, I, H, W), weight (C, I, 3, 3), bias (C,); x1, x2: halves (B, C / 2, H, W); x1 is None if x2 is all there
    is. ``precision``: see kernels.conv3x3. raw_scale, clamp, form, limit: see kernels.coupling.

    Returns z (B, C, H, W) if ``result`` is "concat", or its second half if there is no x1; if it is "likelihood", z's
    log-likelihood map (B, H, W) float32. The log_det (B,) float32 and the convolution (B, C, H, W) follow if they are
    wanted.
    """
    b, channels, height, width = hidden.shape
    half = x2.shape[1]
    hidden_rows, stride = as_rows(hidden)
    weight, step_out, step_tap = weight_rows(weight)
    (x1_rows, x1_stride), (x2_rows, x2_stride) = NO_ROWS if x1 is None else as_rows(x1), as_rows(x2)
    raw = new_rows(hidden, 2 * half) if with_raw else None
    size = product_tile("conv3x3_coupling", hidden.device, exact(hidden, precision)).within(
        height * width, 2 * half, channels
    )
    grid = (b * triton.cdiv(height * width, size.m), triton.cdiv(half, size.n // 2))
    partial = torch.empty(grid, dtype=torch.float32, device=hidden.device) if with_log_det else None
    out1, out2, logp = None, None, None
    if result == "likelihood":
        # Each program's share.
        logp = torch.empty((b, height, width, grid[1]), dtype=torch.float32, device=hidden.device)
    else:
        (out,) = new_results(x1, x2, result)
        out1, out2 = None if x1 is None else out[:, :half], out[:, -half:]
    out_stride = half if x1 is None else 2 * half
    with on(hidden.device):
        launched(conv3x3_coupling_kernel)[grid](
            hidden_rows, weight, bias, x1_rows, x2_rows, out1, out2, raw, partial, logp, height, width, channels, half,
            stride, x1_stride, x2_stride, out_stride, step_out, step_tap, raw_scale, clamp, limit,
            FORM=form, PRECISION=precision, **size.options,
        )  # fmt: skip
    results = [out if logp is None else logp.sum(dim=3)]
    if partial is not None:
        results.append(partial.view(b, -1).sum(dim=1))
    return results if raw is None else [*results, raw]
