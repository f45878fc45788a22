"""3x3 convolution, then the coupling that its outputs drive, in one pass: log-scales and shifts stay in registers.

A program computes the pairs (s, t) of a tile of pixels and transformed channels, as neighbouring columns of one
product, then does what coupling_kernel does, and the same number of kept channels besides.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .conv3x3 import convolve, exact, image_tile, weight_rows
from .coupling import FORMS, halves, log_likelihood_map, new_squares
from .functions import global_gain, soft_clamp
from .launch import launched, on
from .rows import as_rows, new_rows
from .tables import product_tile


@triton.jit
def _place(v, j, c, count, global_scale, global_offset, inverse_perm, limit, z, row, z_stride, m, valid):
    """Global affine, bound and permuted store of the channels j of x, if z is wanted.

    -> log g of each, 0 where there is none; the sum of their squares.
    """
    log_gain = tl.zeros_like(v)
    in_range = c < count
    to = j
    if global_scale is not None:
        gain = global_gain(tl.load(global_scale + j, mask=in_range, other=0.0).to(tl.float32))[None, :]
        offset = tl.load(global_offset + j, mask=in_range, other=0.0).to(tl.float32)[None, :]
        v = v * gain + offset
        to = tl.load(inverse_perm + j, mask=in_range, other=0).to(tl.int32)
        log_gain += tl.log(gain)
    if limit is not None:
        v = tl.where(v > limit, limit, tl.where(v < -limit, -limit, v))
    mask = valid[:, None] & in_range[None, :]
    if z is not None:
        tl.store(z + row * z_stride + m[:, None] * z_stride + to[None, :], v.to(z.dtype.element_ty), mask=mask)
    return tl.where(mask, log_gain, 0.0), tl.sum(tl.where(mask, v * v, 0.0), axis=1)


@triton.jit
def conv3x3_coupling_kernel(
    inputs,  # (rows, stride)
    weight,  # outputs: ``changed`` log-scales, then as many shifts
    bias,  # (2 changed,)
    kept_x,  # (rows, kept_stride)
    changed_x,  # (rows, changed_stride)
    global_scale,  # (kept + changed,) or None
    global_offset,  # likewise
    inverse_perm,  # (kept + changed,) int64; or None
    z,  # (rows, kept + changed); or None
    raw,  # (rows, 2 changed): the convolution; or None
    partial,  # (programs of dimension 0, programs of dimension 1) float32: log-det
    squares,  # (rows, programs of dimension 1) float32: sum of z^2; or None
    height,
    width,
    channels,
    kept,
    changed,
    stride,
    kept_stride,
    changed_stride,
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
    _, row, m, y, x, valid = image_tile(tl.program_id(0), height, width, BLOCK_M)
    PAIRS: tl.constexpr = BLOCK_N // 2
    column = tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * PAIRS + column // 2
    # Columns whose channel is out of range must not read another channel's shift.
    output = tl.where(c < changed, c + (column % 2) * changed, 2 * changed)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = convolve(
        acc, None, inputs, weight, output, None, 2 * changed, row, m, y, x, valid, height, width, channels, stride,
        1, weight_out, weight_tap, False, PRECISION, BLOCK_K,
    )  # fmt: skip
    acc += tl.load(bias + output, mask=output < 2 * changed, other=0.0).to(tl.float32)[None, :]
    if raw is not None:
        mask = valid[:, None] & (output < 2 * changed)[None, :]
        at = raw + row * 2 * changed + m[:, None] * 2 * changed + output[None, :]
        tl.store(at, acc.to(raw.dtype.element_ty), mask=mask)
    raw_s, t = tl.split(tl.reshape(acc, (BLOCK_M, PAIRS, 2)))
    s, _ = soft_clamp(raw_s * raw_scale, clamp, FORM)
    c = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    mask = valid[:, None] & (c < changed)[None, :]
    log_det = tl.where(mask, s, 0.0)
    at = changed_x + row * changed_stride + m[:, None] * changed_stride + c[None, :]
    v = tl.load(at, mask=mask, other=0.0).to(tl.float32) * tl.exp(s) + t * raw_scale
    z_stride = kept + changed
    log_gain, square = _place(
        v, kept + c, c, changed, global_scale, global_offset, inverse_perm, limit, z, row, z_stride, m, valid
    )
    log_det += log_gain
    if kept > 0:
        mask = valid[:, None] & (c < kept)[None, :]
        at = kept_x + row * kept_stride + m[:, None] * kept_stride + c[None, :]
        v = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        log_gain, kept_square = _place(
            v, c, c, kept, global_scale, global_offset, inverse_perm, limit, z, row, z_stride, m, valid
        )
        log_det += log_gain
        square += kept_square
    if squares is not None:
        tl.store(squares + (row + m) * tl.num_programs(1) + tl.program_id(1), square, mask=valid)
    tl.store(partial + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(log_det))


def conv3x3_coupling(
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
    precision: str,
    keep: bool,
    likelihood: bool,
) -> list[Tensor]:
    """hidden (B, I, H, W), weight (2 changed, I, 3, 3), bias (2 changed,), ``parts`` and the others as for ``coupling``
    -> z (B, C, H, W) or its log-likelihood map (B, H, W), log_det (B,) float32 and, where ``keep``, the convolution
    (B, 2 changed, H, W).

    Not more channels may be kept than are changed.
    """
    b, channels, height, width = hidden.shape
    changed = len(weight) // 2
    kept = sum(part.shape[1] for part in parts) - changed
    hidden_rows, stride = as_rows(hidden)
    weight, step_out, step_tap = weight_rows(weight)
    (kept_x, kept_stride), (changed_x, changed_stride) = halves(parts, kept)
    raw = new_rows(hidden, 2 * changed) if keep else None
    size = product_tile("conv3x3_coupling", hidden.device, exact(hidden, precision)).within(
        height * width, 2 * changed, channels
    )
    grid = (b * triton.cdiv(height * width, size.m), triton.cdiv(changed, size.n // 2))
    partial = torch.empty(grid, dtype=torch.float32, device=hidden.device)
    out = new_squares(hidden, grid[1]) if likelihood else new_rows(hidden, kept + changed, parts[0].dtype)
    z, squares = (None, out) if likelihood else (out, None)
    with on(hidden.device):
        launched(conv3x3_coupling_kernel)[grid](
            hidden_rows, weight, bias, kept_x, changed_x, global_scale, global_offset, inverse_perm, z, raw, partial,
            squares, height, width, channels, kept, changed, stride, kept_stride, changed_stride, step_out, step_tap,
            raw_scale, clamp, limit, FORM=FORMS[form], PRECISION=precision, **size.options,
        )  # fmt: skip
    result = log_likelihood_map(out, kept + changed) if likelihood else out
    return [result, partial.view(b, -1).sum(dim=1), *([] if raw is None else [raw])]
