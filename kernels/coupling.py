"""Affine coupling: soft clamp, exp, affine, global affine, channel permutation and log-det, in one pass.

Both kernels run over the channels of the flow's output side (z), which the permutation ties to those of its input side:
z[i] belongs to x[perm[i]]. So one index array serves all directions; reads through it are cached, and forward writes in
whole runs. Where no permutation is given, z[i] belongs to x[i].

A row of x: ``kept`` channels that pass, then ``changed`` channels that are transformed. A row of raw, the subnet's
output: ``changed`` log-scales, then as many shifts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .functions import ATAN, SCALED_TANH, TANH, global_gain, soft_clamp
from .launch import launched, on
from .rows import MaybeRows, Rows, as_rows, new_rows
from .tables import tile

FORMS = {"tanh": TANH.value, "scaled_tanh": SCALED_TANH.value, "atan": ATAN.value}


@triton.jit
def _tile(program, pixels, channels, perm, kept, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """-> first row (int64), row offsets, channels i of z and j of x, mask of the tile, mask of the changed channels."""
    tiles = tl.cdiv(pixels, BLOCK_P)
    image, tile = program // tiles, program % tiles
    row = image.to(tl.int64) * pixels + tile * BLOCK_P
    p = tl.arange(0, BLOCK_P)
    i = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    j = i
    if perm is not None:
        j = tl.load(perm + i, mask=i < channels, other=0).to(tl.int32)
    mask = (tile * BLOCK_P + p < pixels)[:, None] & (i < channels)[None, :]
    return row, image, p[:, None], i, j, mask, mask & (j >= kept)[None, :]


@triton.jit
def _load_x(kept_x, changed_x, row, p, j, mask, is_changed, kept, kept_stride, changed_stride):
    """x[:, j], of which the first ``kept`` channels lie in one tensor and the others in another."""
    x = tl.load(changed_x + row * changed_stride + p * changed_stride + (j - kept)[None, :], mask=is_changed, other=0.0)
    x1 = tl.load(kept_x + row * kept_stride + p * kept_stride + j[None, :], mask=mask & ~is_changed, other=0.0)
    return tl.where(is_changed, x.to(tl.float32), x1.to(tl.float32))


@triton.jit
def _log_scale(raw, row, p, j, is_changed, kept, changed, raw_stride, raw_scale, clamp, FORM: tl.constexpr):
    """-> s, ds / draw, t of the changed channels, 0 elsewhere."""
    offset = row * raw_stride + p * raw_stride + (j - kept)[None, :]
    raw_s = tl.load(raw + offset, mask=is_changed, other=0.0).to(tl.float32) * raw_scale
    t = tl.load(raw + offset + changed, mask=is_changed, other=0.0).to(tl.float32) * raw_scale
    s, slope = soft_clamp(raw_s, clamp, FORM)
    return s, slope * raw_scale, t


@triton.jit
def coupling_kernel(
    kept_x,  # forward: (rows, kept_stride) x's kept channels; inverse: not read
    changed_x,  # forward: (rows, changed_stride) x's changed channels; inverse: not read
    z,  # (rows, z_stride): written forward, read inverse; None where only its likelihood is wanted
    x,  # (rows, x_stride): written inverse
    raw,  # (rows, raw_stride)
    global_scale,  # (kept + changed,), by x's channel
    global_offset,  # likewise
    perm,  # (kept + changed,) int64
    partial,  # (programs of dimension 0, programs of dimension 1) float32: log-det
    squares,  # (rows, programs of dimension 1) float32: sum of z^2; or None
    pixels,
    kept,
    changed,
    kept_stride,
    changed_stride,
    z_stride,
    x_stride,
    raw_stride,
    raw_scale,
    clamp,
    limit,
    FORM: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = kept + changed
    row, image, p, i, j, mask, is_changed = _tile(tl.program_id(0), pixels, channels, perm, kept, BLOCK_P, BLOCK_C)
    s, _, t = _log_scale(raw, row, p, j, is_changed, kept, changed, raw_stride, raw_scale, clamp, FORM)
    log_det = tl.where(is_changed, s, 0.0)
    if global_scale is not None:
        gain = global_gain(tl.load(global_scale + j, mask=i < channels, other=0.0).to(tl.float32))[None, :]
        offset = tl.load(global_offset + j, mask=i < channels, other=0.0).to(tl.float32)[None, :]
        log_det += tl.where(mask, tl.log(gain), 0.0)
    if INVERSE:
        z_at = z + row * z_stride + p * z_stride + i[None, :]
        v = tl.load(z_at, mask=mask, other=0.0).to(tl.float32)
        if global_scale is not None:
            v = (v - offset) / gain
        v = tl.where(is_changed, (v - t) * tl.exp(-s), v)
        x_at = x + row * x_stride + p * x_stride + j[None, :]
        tl.store(x_at, v.to(x.dtype.element_ty), mask=mask)
        log_det = -log_det
    else:
        v = _load_x(kept_x, changed_x, row, p, j, mask, is_changed, kept, kept_stride, changed_stride)
        v = tl.where(is_changed, v * tl.exp(s) + t, v)
        if global_scale is not None:
            v = v * gain + offset
        if limit is not None:
            v = tl.where(v > limit, limit, tl.where(v < -limit, -limit, v))
        if squares is not None:
            total = tl.sum(tl.where(mask, v * v, 0.0), axis=1, keep_dims=True)
            squares_at = squares + (row + p) * tl.num_programs(1) + tl.program_id(1)
            tl.store(squares_at, total, mask=row + p < (image.to(tl.int64) + 1) * pixels)
        else:
            z_at = z + row * z_stride + p * z_stride + i[None, :]
            tl.store(z_at, v.to(z.dtype.element_ty), mask=mask)
    tl.store(partial + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(log_det))


@triton.jit
def coupling_backward_kernel(
    kept_x,  # as for coupling_kernel: x, the input of forward or the output of inverse
    changed_x,
    grad_kept_x,  # (rows, grad_kept_stride): written forward, read inverse (gradient of inverse's output)
    grad_changed_x,  # (rows, grad_changed_stride): likewise
    grad_z,  # (rows, grad_z_stride): read forward, written inverse; or None
    grad_logp,  # (rows,) float32: in place of grad_z where only z's likelihood went on; or None
    grad_log_det,  # (B,) float32
    raw,
    grad_raw,  # (rows, 2 changed): written
    global_scale,
    perm,
    partial_gain,  # (programs of dimension 0, kept + changed) float32: gradient of g, log-det's share not included
    partial_offset,  # likewise, of o
    pixels,
    kept,
    changed,
    kept_stride,
    changed_stride,
    grad_kept_stride,
    grad_changed_stride,
    grad_z_stride,
    raw_stride,
    raw_scale,
    clamp,
    limit,
    FORM: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = kept + changed
    row, image, p, i, j, mask, is_changed = _tile(tl.program_id(0), pixels, channels, perm, kept, BLOCK_P, BLOCK_C)
    s, slope, t = _log_scale(raw, row, p, j, is_changed, kept, changed, raw_stride, raw_scale, clamp, FORM)
    x = _load_x(kept_x, changed_x, row, p, j, mask, is_changed, kept, kept_stride, changed_stride)
    # y: x after the coupling, before the global affine.
    y = tl.where(is_changed, x * tl.exp(s) + t, x)
    grad_s = tl.load(grad_log_det + image)
    grad_kept_at = grad_kept_x + row * grad_kept_stride + p * grad_kept_stride + j[None, :]
    grad_changed_at = grad_changed_x + row * grad_changed_stride + p * grad_changed_stride + (j - kept)[None, :]
    if global_scale is not None:
        gain = global_gain(tl.load(global_scale + j, mask=i < channels, other=0.0).to(tl.float32))[None, :]
    if INVERSE:
        grad_x = _load_x(
            grad_kept_x, grad_changed_x, row, p, j, mask, is_changed, kept, grad_kept_stride, grad_changed_stride
        )
        grad_y = tl.where(is_changed, grad_x * tl.exp(-s), grad_x)
        grad_s = -grad_x * x - grad_s
        grad_t = -grad_y
        grad_v = grad_y
        if global_scale is not None:
            grad_v = grad_y / gain
        grad_z_at = grad_z + row * grad_z_stride + p * grad_z_stride + i[None, :]
        tl.store(grad_z_at, grad_v.to(grad_z.dtype.element_ty), mask=mask)
        grad_offset = -grad_v
        grad_gain = -grad_v * y
    else:
        if grad_logp is not None:
            # The couplings across levels, which alone are followed by the likelihood, have no global affine: z = y.
            valid = row + p < (image.to(tl.int64) + 1) * pixels
            grad_v = -tl.load(grad_logp + row + p, mask=valid, other=0.0) / channels * y
        else:
            grad_z_at = grad_z + row * grad_z_stride + p * grad_z_stride + i[None, :]
            grad_v = tl.load(grad_z_at, mask=mask, other=0.0).to(tl.float32)
        if limit is not None:
            grad_v = tl.where(tl.abs(y) <= limit, grad_v, 0.0)
        grad_offset = grad_v
        grad_gain = grad_v * y
        grad_y = grad_v
        if global_scale is not None:
            grad_y = grad_v * gain
        grad_t = grad_y
        grad_x = tl.where(is_changed, grad_y * tl.exp(s), grad_y)
        grad_s = grad_x * x + grad_s
        tl.store(grad_kept_at, grad_x.to(grad_kept_x.dtype.element_ty), mask=mask & ~is_changed)
        tl.store(grad_changed_at, grad_x.to(grad_changed_x.dtype.element_ty), mask=is_changed)
    grad_raw_at = grad_raw + row * 2 * changed + p * 2 * changed + (j - kept)[None, :]
    tl.store(grad_raw_at, (grad_s * slope).to(grad_raw.dtype.element_ty), mask=is_changed)
    tl.store(grad_raw_at + changed, (grad_t * raw_scale).to(grad_raw.dtype.element_ty), mask=is_changed)
    if global_scale is not None:
        at = tl.program_id(0).to(tl.int64) * channels + j
        tl.store(partial_gain + at, tl.sum(tl.where(mask, grad_gain, 0.0), axis=0), mask=i < channels)
        tl.store(partial_offset + at, tl.sum(tl.where(mask, grad_offset, 0.0), axis=0), mask=i < channels)


def coupling(
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
    """-> (z, or x where ``inverse``: (B, C, H, W) of the dtype of ``parts``; log_det (B,) float32 of this direction).

    ``parts``: [x], or [kept channels, changed channels] of x; where ``inverse``, [z]. ``raw``: (B, 2 changed, H, W).
    The global affine and the permutation take part where they are given; ``limit`` bounds z. Where ``likelihood``, z is
    not written: -0.5 mean over channels of z^2, (B, H, W) float32, stands in its place.
    """
    changed = raw.shape[1] // 2
    channels = sum(part.shape[1] for part in parts)
    grid, meta = _grid("coupling", raw, channels)
    partial = torch.empty(grid, dtype=torch.float32, device=raw.device)
    out = new_squares(raw, grid[1]) if likelihood else new_rows(raw, channels, parts[0].dtype)
    squares = out if likelihood else None
    none: MaybeRows = (None, 0)
    out_rows: MaybeRows = none if likelihood else as_rows(out)
    kept_x, changed_x, z, x = none, none, out_rows, none
    if inverse:
        z, x = as_rows(parts[0]), out_rows
    else:
        kept_x, changed_x = halves(parts, channels - changed)
    raw_rows = as_rows(raw)
    with on(raw.device):
        launched(coupling_kernel)[grid](
            kept_x[0], changed_x[0], z[0], x[0], raw_rows[0], global_scale, global_offset, perm, partial, squares,
            raw.shape[2] * raw.shape[3], channels - changed, changed,
            kept_x[1], changed_x[1], z[1], x[1], raw_rows[1], raw_scale, clamp, limit,
            FORM=FORMS[form], INVERSE=inverse, **meta,
        )  # fmt: skip
    result = log_likelihood_map(out, channels) if likelihood else out
    return result, partial.view(raw.shape[0], -1).sum(dim=1)


def coupling_backward(
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
    """Gradients of ``parts`` and raw, then, where there is a global affine, of its gain g and its offset, (C,) float32.

    ``parts``: x as for ``coupling``; where ``inverse``, [x] as it came out, and the first gradient is z's. Where
    ``likelihood``, ``grad_out`` is the log-likelihood map's. The gain's gradient lacks what comes through log_det's
    H W sum_c log g_c.
    """
    changed = raw.shape[1] // 2
    channels = sum(part.shape[1] for part in parts)
    grads = [new_rows(part, part.shape[1]) for part in parts]
    x, raw_rows = halves(parts, channels - changed), as_rows(raw)
    grad_logp = grad_out.contiguous() if likelihood else None
    grad_z: MaybeRows
    if inverse:
        grad_x, grad_z = halves([grad_out], channels - changed), as_rows(grads[0])
    else:
        grad_x, grad_z = halves(grads, channels - changed), (None, 0) if likelihood else as_rows(grad_out)
    grad_raw = new_rows(raw, raw.shape[1])
    grid, meta = _grid("coupling_backward", raw, channels)
    partial_gain, partial_offset = (
        (torch.empty((grid[0], channels), dtype=torch.float32, device=raw.device) for _ in range(2))
        if global_scale is not None
        else (None, None)
    )
    with on(raw.device):
        launched(coupling_backward_kernel)[grid](
            x[0][0], x[1][0], grad_x[0][0], grad_x[1][0], grad_z[0], grad_logp, grad_log_det.contiguous(),
            raw_rows[0], grad_raw, global_scale, perm, partial_gain, partial_offset,
            raw.shape[2] * raw.shape[3], channels - changed, changed,
            x[0][1], x[1][1], grad_x[0][1], grad_x[1][1], grad_z[1], raw_rows[1], raw_scale, clamp, limit,
            FORM=FORMS[form], INVERSE=inverse, **meta,
        )  # fmt: skip
    if partial_gain is None or partial_offset is None:
        return [*grads, grad_raw]
    return [*grads, grad_raw, partial_gain.sum(dim=0), partial_offset.sum(dim=0)]


def new_squares(like: Tensor, programs: int) -> Tensor:
    """(B, H, W, programs) float32 on ``like``'s grid: each program's share of a pixel's sum of squares."""
    b, _, h, w = like.shape
    return torch.empty((b, h, w, programs), dtype=torch.float32, device=like.device)


def log_likelihood_map(squares: Tensor, channels: int) -> Tensor:
    """What ``new_squares`` holds -> -0.5 mean over channels of z^2, (B, H, W)."""
    return squares.sum(dim=3) * (-0.5 / channels)


def halves(parts: list[Tensor], kept: int) -> tuple[Rows, Rows]:
    """Rows of the kept and of the changed channels."""
    if len(parts) == 2:
        return as_rows(parts[0]), as_rows(parts[1])
    if kept == 0:
        return as_rows(parts[0]), as_rows(parts[0])
    x, stride = as_rows(parts[0])
    return (x[:, :kept], stride), (x[:, kept:], stride)


def _grid(kernel: str, raw: Tensor, channels: int) -> tuple[tuple[int, int], dict[str, int]]:
    b, _, h, w = raw.shape
    size = tile(kernel, raw.device).within(h * w, channels)
    grid = (b * triton.cdiv(h * w, size.pixels), triton.cdiv(channels, size.channels))
    return grid, {"BLOCK_P": size.pixels, "BLOCK_C": size.channels, **size.options}
