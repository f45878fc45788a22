"""Affine coupling: soft clamp, exp, affine, global affine, channel permutation and log-det, in one pass.

A program holds whole rows, so every row is read and written as it lies. A row of x is a pair of halves, each compact in
a tensor of its own or a slice of a wider one: x1 passes, x2 is transformed. A row of raw, the subnet's output, holds
the log-scales of x2's channels, then as many shifts. The permutation of channels takes place in shared memory.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .channels_last import MaybeRows, as_rows, new_results, new_rows
from .configs import tile
from .launch import launched, on
from .math import global_gain, soft_clamp
from .permutation import permuted

# Programs of the backward pass: enough for a large chip, few enough that their partial sums stay a small share of what
# is read. Fixed, so that the order of the sums is too.
BACKWARD_PROGRAMS = 512
NO_ROWS: MaybeRows = (None, 0)


@triton.jit
def _tile(program, pixels, half, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Returns image, first row (int64), row offsets, channels of a half, mask of the rows, mask of the tile."""
    tiles = tl.cdiv(pixels, BLOCK_P)
    image, tile = program // tiles, program % tiles
    p = tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    valid = tile * BLOCK_P + p < pixels
    return image, image.to(tl.int64) * pixels + tile * BLOCK_P, p, c, valid, valid[:, None] & (c < half)[None, :]


@triton.jit
def _load(pointer, row, p, c, stride, mask):
    """Loads a tile of rows."""
    return tl.load(pointer + row * stride + p[:, None] * stride + c[None, :], mask=mask, other=0.0)


@triton.jit
def _store(pointer, value, row, p, c, stride, mask):
    """Stores a tile of rows in the pointer's dtype."""
    at = pointer + row * stride + p[:, None] * stride + c[None, :]
    tl.store(at, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _load_channels(pointer, c, half):
    """Loads one value for each channel of a half, as a row in float32."""
    return tl.load(pointer + c, mask=c < half, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _clamped(raw, bias, row, p, c, half, mask, raw_stride, raw_scale, clamp, FORM: tl.constexpr):
    """Returns s, ds / draw and t of x2's channels, 0 elsewhere."""
    raw_s = _load(raw, row, p, c, raw_stride, mask).to(tl.float32)
    t = _load(raw + half, row, p, c, raw_stride, mask).to(tl.float32)
    if bias is not None:
        raw_s += _load_channels(bias, c, half)
        t += _load_channels(bias + half, c, half)
    s, slope = soft_clamp(raw_s * raw_scale, clamp, FORM)
    return s, slope * raw_scale, t * raw_scale


@triton.jit
def _bounded(v, limit):
    """Cuts v off at +-limit; NaN stays NaN."""
    return tl.where(v > limit, limit, tl.where(v < -limit, -limit, v))


@triton.jit
def coupling_kernel(
    x1,  # (rows, x1_stride) or None: x's first half; inverse: z's
    x2,  # (rows, x2_stride)
    raw,  # (rows, raw_stride); or None: x2 passes, too
    bias,  # (2 half,) of raw; or None
    global_scale,  # (2 half,), by x's channel; or None
    global_offset,  # likewise
    index,  # (2 half,) int64: channel i of what comes out is channel index[i]; or None
    z1,  # (rows, z1_stride): written, as x1 is read; or None
    z2,  # (rows, z2_stride); or None
    logp,  # (rows,) float32: written in place of z; or None
    partial,  # (programs,) float32: log-det; or None
    pixels,
    half,
    x1_stride,
    x2_stride,
    raw_stride,
    z1_stride,
    z2_stride,
    raw_scale,
    clamp,
    limit,
    FORM: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """z = permute(concat(x1, x2 exp(s) + t) g + o), bounded to +-limit, and log_det = sum s + sum log g per program.

    s = soft_clamp(raw_scale (raw_s + bias_s)); t = raw_scale (raw_t + bias_t). INVERSE: x from z.
    """
    _, row, p, c, valid, mask = _tile(tl.program_id(0), pixels, half, BLOCK_P, BLOCK_C)
    v2 = _load(x2, row, p, c, x2_stride, mask)
    if x1 is not None:
        v1 = _load(x1, row, p, c, x1_stride, mask)
        if INVERSE:
            v1, v2 = permuted(v1, v2, index, c, half, BLOCK_P, BLOCK_C)
        v1 = v1.to(tl.float32)
    v2 = v2.to(tl.float32)
    log_det = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    if raw is not None:
        s, _, t = _clamped(raw, bias, row, p, c, half, mask, raw_stride, raw_scale, clamp, FORM)
        log_det += tl.where(mask, s, 0.0)
    if global_scale is not None:
        gain1 = global_gain(_load_channels(global_scale, c, half))
        gain2 = global_gain(_load_channels(global_scale + half, c, half))
        offset1, offset2 = _load_channels(global_offset, c, half), _load_channels(global_offset + half, c, half)
        if partial is not None:
            log_det += tl.where(mask, tl.log(gain1) + tl.log(gain2), 0.0)
    if INVERSE:
        if global_scale is not None:
            v1 = (v1 - offset1) / gain1
            v2 = (v2 - offset2) / gain2
        v2 = (v2 - t) * tl.exp(-s)
        log_det = -log_det
    else:
        if raw is not None:
            v2 = v2 * tl.exp(s) + t
        if global_scale is not None:
            v1 = v1 * gain1 + offset1
            v2 = v2 * gain2 + offset2
        if limit is not None:
            v1, v2 = _bounded(v1, limit), _bounded(v2, limit)
    if logp is not None:
        square = tl.sum(tl.where(mask, v1 * v1 + v2 * v2, 0.0), axis=1)
        tl.store(logp + row + p, -0.25 * square / half, mask=valid)
    else:
        if x1 is not None:
            v1, v2 = v1.to(z1.dtype.element_ty), v2.to(z2.dtype.element_ty)
            if (index is not None) and (not INVERSE):
                v1, v2 = permuted(v1, v2, index, c, half, BLOCK_P, BLOCK_C)
            _store(z1, v1, row, p, c, z1_stride, mask)
        _store(z2, v2, row, p, c, z2_stride, mask)
    if partial is not None:
        tl.store(partial + tl.program_id(0), tl.sum(log_det))


@triton.jit
def coupling_backward_kernel(
    x1,  # as for coupling_kernel: x, the input of forward or the output of inverse
    x2,
    raw,
    bias,
    global_scale,
    index,  # where the gradient of channel i comes from: the inverse of coupling_kernel's
    grad_in1,  # (rows, in1_stride) or None: the gradient of what came out
    grad_in2,  # (rows, in2_stride); or None
    grad_logp,  # (rows,) float32: in its place where only z's likelihood went on; or None
    grad_log_det,  # (B,) float32
    grad_out1,  # (rows, half): written, the gradient of what went in; or None
    grad_out2,  # (rows, half): written
    grad_raw,  # (rows, 2 half): written
    partial,  # (programs, sums) float32: gradients of g and o, 2 half each, if there are any, then of bias, 2 half
    rows,
    pixels,
    half,
    steps,  # tiles of rows in a program
    x1_stride,
    x2_stride,
    raw_stride,
    in1_stride,
    in2_stride,
    raw_scale,
    clamp,
    limit,
    FORM: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of coupling_kernel's inputs; s, t and y are computed again from x and raw.

    With y2 = x2 exp(s) + t and z = y g + o: dy = g dz, dx2 = dy2 exp(s), ds = dy2 exp(s) x2 + dlog_det, dt = dy2,
    draw_s = ds (ds / draw_s). A program sums the channels' gradients over its rows.
    """
    p = tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    sum_s = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum_v2 = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    if global_scale is not None:
        gain1 = global_gain(_load_channels(global_scale, c, half))
        gain2 = global_gain(_load_channels(global_scale + half, c, half))
        sum_v1 = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        sum_gain1 = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        sum_gain2 = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for step in range(steps):
        row = (tl.program_id(0).to(tl.int64) * steps + step) * BLOCK_P
        valid = row + p < rows
        mask = valid[:, None] & (c < half)[None, :]
        s, slope, t = _clamped(raw, bias, row, p, c, half, mask, raw_stride, raw_scale, clamp, FORM)
        value2 = _load(x2, row, p, c, x2_stride, mask).to(tl.float32)
        # y: x after the coupling, before the global affine.
        y2 = value2 * tl.exp(s) + t
        if x1 is not None:
            y1 = _load(x1, row, p, c, x1_stride, mask).to(tl.float32)
        if grad_logp is not None:
            # The couplings across levels, which alone are followed by the likelihood, have no global affine: z = y.
            grad = -0.5 / half * tl.load(grad_logp + row + p, mask=valid, other=0.0)[:, None]
            grad1, grad2 = grad * y1, grad * y2
        else:
            grad2 = _load(grad_in2, row, p, c, in2_stride, mask)
            if x1 is not None:
                grad1 = _load(grad_in1, row, p, c, in1_stride, mask)
                if (index is not None) and (not INVERSE):
                    grad1, grad2 = permuted(grad1, grad2, index, c, half, BLOCK_P, BLOCK_C)
                grad1 = grad1.to(tl.float32)
            grad2 = grad2.to(tl.float32)
        grad_s = tl.load(grad_log_det + (row + p) // pixels, mask=valid, other=0.0)[:, None]
        if INVERSE:
            # From the gradients of x to those of y = (z - o) / g, in x's order.
            grad_s = -grad2 * value2 - grad_s
            grad2 = grad2 * tl.exp(-s)
            grad_t = -grad2
            if global_scale is not None:
                grad1, grad2 = grad1 / gain1, grad2 / gain2
                sum_gain1 -= grad1 * y1
                sum_gain2 -= grad2 * y2
                sum_v1 -= grad1
            sum_v2 -= grad2
        else:
            if limit is not None:
                grad1 = tl.where(tl.abs(y1) <= limit, grad1, 0.0)
                grad2 = tl.where(tl.abs(y2) <= limit, grad2, 0.0)
            sum_v2 += grad2
            if global_scale is not None:
                sum_v1 += grad1
                sum_gain1 += grad1 * y1
                sum_gain2 += grad2 * y2
                grad1, grad2 = grad1 * gain1, grad2 * gain2
            grad_t = grad2
            grad2 = grad2 * tl.exp(s)
            grad_s = grad2 * value2 + grad_s
        grad_s = grad_s * slope
        sum_s += grad_s
        _store(grad_raw, grad_s, row, p, c, 2 * half, mask)
        _store(grad_raw + half, grad_t * raw_scale, row, p, c, 2 * half, mask)
        if x1 is not None:
            grad1, grad2 = grad1.to(grad_out1.dtype.element_ty), grad2.to(grad_out2.dtype.element_ty)
            if INVERSE:
                grad1, grad2 = permuted(grad1, grad2, index, c, half, BLOCK_P, BLOCK_C)
            _store(grad_out1, grad1, row, p, c, half, mask)
        _store(grad_out2, grad2, row, p, c, half, mask)
    sums = partial + tl.program_id(0).to(tl.int64) * ((6 if global_scale is not None else 2) * half) + c
    through = c < half
    total2 = tl.sum(sum_v2, axis=0)
    if global_scale is not None:
        tl.store(sums, tl.sum(sum_gain1, axis=0), mask=through)
        tl.store(sums + half, tl.sum(sum_gain2, axis=0), mask=through)
        tl.store(sums + 2 * half, tl.sum(sum_v1, axis=0), mask=through)
        tl.store(sums + 3 * half, total2, mask=through)
        sums += 4 * half
        total2 = total2 * tl.reshape(gain2, (BLOCK_C,))
    # t's gradient is that of y2, which is the gain times that of what comes out.
    tl.store(sums, tl.sum(sum_s, axis=0), mask=through)
    tl.store(sums + half, total2 * raw_scale, mask=through)


def coupling(
    x1: Tensor | None,
    x2: Tensor,
    raw: Tensor | None,
    bias: Tensor | None,
    *,
    global_scale: Tensor | None,
    global_offset: Tensor | None,
    index: Tensor | None,
    raw_scale: float,
    clamp: float,
    form: int,
    limit: float | None,
    inverse: bool,
    result: str,
    with_log_det: bool,
) -> list[Tensor]:
    """Launches ``coupling_kernel``: z from x, or x from z if ``inverse``.

    x1, x2: halves (B, C / 2, H, W); x1 is None if x2 is all there is. raw (B, C, H, W), bias (C,): log-scales, then
    shifts; without raw nothing is transformed. global_scale, global_offset (C,), index (C,) int64: the global affine
    and the permutation, or None; channel i of the result is channel index[i]. ``form``: TANH, SCALED_TANH or ATAN of
    kernels.math. ``limit``: the bound on |z|, or None.

    Returns what ``result`` says, of x2's dtype: "halves": two tensors; "concat": one, (B, C, H, W), or x2's alone;
    "likelihood": -0.5 mean over channels of z^2, (B, H, W) float32, in place of z, which is not written. If
    ``with_log_det``, the log_det (B,) float32 of this direction follows.
    """
    b, half, h, w = x2.shape
    size = tile("coupling", x2.device).rows_of(half)
    programs = b * triton.cdiv(h * w, size.pixels)
    results = new_results(x1, x2, result)
    z1, z2 = NO_ROWS, NO_ROWS
    if result != "likelihood":
        z1, z2 = _rows_of_halves(x1, results)
    logp = results[0] if result == "likelihood" else None
    partial = torch.empty(programs, dtype=torch.float32, device=x2.device) if with_log_det else None
    in1, in2, raw_rows = _maybe_rows(x1), as_rows(x2), _maybe_rows(raw)
    with on(x2.device):
        launched(coupling_kernel)[(programs,)](
            in1[0], in2[0], raw_rows[0], bias, global_scale, global_offset, index, z1[0], z2[0], logp, partial,
            h * w, half, in1[1], in2[1], raw_rows[1], z1[1], z2[1], raw_scale, clamp, limit,
            FORM=form, INVERSE=inverse, BLOCK_P=size.pixels, BLOCK_C=size.channels, **size.options,
        )  # fmt: skip
    return results if partial is None else [*results, partial.view(b, -1).sum(dim=1)]


def coupling_backward(
    grads: Sequence[Tensor],
    grad_log_det: Tensor,
    x1: Tensor | None,
    x2: Tensor,
    *,
    raw: Tensor,
    bias: Tensor | None,
    global_scale: Tensor | None,
    index: Tensor | None,
    raw_scale: float,
    clamp: float,
    form: int,
    limit: float | None,
    inverse: bool,
    result: str,
) -> list[Tensor]:
    """Launches ``coupling_backward_kernel``: the gradients of ``coupling``.

    ``grads``: the gradients of ``coupling``'s results; ``grad_log_det`` (B,). x1, x2: the halves of x; if ``inverse``,
    of the x that ``coupling`` returned. ``index``: the inverse of ``coupling``'s. The others: as for ``coupling``.

    Returns the gradients of x1 (of z1 if ``inverse``), if there is one, of x2 (z2), of raw and, in one float32 vector
    of sums over all pixels, of the gain g and the offset, (C,) each, if there is a global affine, and of bias (C,). The
    gain's gradient lacks what comes through log_det's H W sum_c log g_c.
    """
    b, half, h, w = x2.shape
    rows = b * h * w
    size = tile("coupling_backward", x2.device).rows_of(half)
    steps = triton.cdiv(triton.cdiv(rows, size.pixels), BACKWARD_PROGRAMS)
    programs = triton.cdiv(rows, size.pixels * steps)
    grad_x1 = None if x1 is None else new_rows(x1, half)
    grad_x2, grad_raw = new_rows(x2, half), new_rows(raw, 2 * half)
    sums = 2 * half if global_scale is None else 6 * half
    partial = torch.empty((programs, sums), dtype=torch.float32, device=x2.device)
    grad1, grad2, grad_logp = NO_ROWS, NO_ROWS, None
    if result == "likelihood":
        grad_logp = grads[0].contiguous()
    else:
        grad1, grad2 = _rows_of_halves(x1, grads)
    in1, in2, raw_rows = _maybe_rows(x1), as_rows(x2), as_rows(raw)
    with on(x2.device):
        launched(coupling_backward_kernel)[(programs,)](
            in1[0], in2[0], raw_rows[0], bias, global_scale, index, grad1[0], grad2[0], grad_logp,
            grad_log_det.contiguous(), grad_x1, grad_x2, grad_raw, partial, rows, h * w, half, steps,
            in1[1], in2[1], raw_rows[1], grad1[1], grad2[1], raw_scale, clamp, limit,
            FORM=form, INVERSE=inverse, BLOCK_P=size.pixels, BLOCK_C=size.channels, **size.options,
        )  # fmt: skip
    first = [] if grad_x1 is None else [grad_x1]
    return [*first, grad_x2, grad_raw, partial.sum(dim=0)]


def _maybe_rows(x: Tensor | None) -> MaybeRows:
    return NO_ROWS if x is None else as_rows(x)


def _rows_of_halves(x1: Tensor | None, tensors: Sequence[Tensor]) -> tuple[MaybeRows, MaybeRows]:
    """Returns the rows of both halves: of two tensors, of the channels of one, or, without an x1, of the second."""
    if x1 is None:
        return NO_ROWS, as_rows(tensors[0])
    if len(tensors) == 2:
        return as_rows(tensors[0]), as_rows(tensors[1])
    joint, stride = as_rows(tensors[0])
    half = x1.shape[1]
    return (joint[:, :half], stride), (joint[:, half:], stride)
