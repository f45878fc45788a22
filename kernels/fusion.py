"""The fusion subnet's way of carrying information between the levels: adaptive average pool to one grid, and back up.

On the way back up bias and ReLU come first, then the bilinear interpolation. Gradients are gathered: each pixel sums
over the pixels that it contributed to, so that no sum's order is left to chance.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .channels_last import as_rows, new_rows
from .configs import tile
from .launch import Tile, launched, on


@triton.jit
def _pixels(program, height, width, BLOCK_P: tl.constexpr):
    """Returns image (int64), row offsets of the tile's pixels in it, their y and x, which are in the image."""
    tiles = tl.cdiv(height * width, BLOCK_P)
    image, block = program // tiles, program % tiles
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    return image.to(tl.int64), p, p // width, p % width, p < height * width


@triton.jit
def _window(n, size, other):
    """Returns first and end of the pixels, of ``other``, that pixel ``n`` of ``size`` meets; the rule is symmetric."""
    return n * other // size, ((n + 1) * other + size - 1) // size


@triton.jit
def pool_kernel(
    source,  # (images, source pixels, source_stride)
    out,  # (images, pixels, out_stride)
    height,
    width,
    source_height,
    source_width,
    channels,
    source_stride,
    out_stride,
    reach_y,  # the longest window
    reach_x,
    BACKWARD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = mean of source over each pixel's window. BACKWARD: out = sum of source / window size over its windows.

    Backward, source is the gradient of the pooled map and out that of the map.
    """
    image, p, y, x, valid = _pixels(tl.program_id(0), height, width, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    y0, y1 = _window(y, height, source_height)
    x0, x1 = _window(x, width, source_width)
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    base = source + image * source_height * source_width * source_stride
    for step in range(reach_y * reach_x):
        sy, sx = y0 + step // reach_x, x0 + step % reach_x
        inside = valid & (sy < y1) & (sx < x1)
        mask = inside[:, None] & (c < channels)[None, :]
        at = base + (sy * source_width + sx)[:, None] * source_stride + c[None, :]
        value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        if BACKWARD:
            wy0, wy1 = _window(sy, source_height, height)
            wx0, wx1 = _window(sx, source_width, width)
            value = value / ((wy1 - wy0) * (wx1 - wx0)).to(tl.float32)[:, None]
        acc += value
    if not BACKWARD:
        acc = acc / ((y1 - y0) * (x1 - x0)).to(tl.float32)[:, None]
    out_at = out + image * height * width * out_stride + p[:, None] * out_stride + c[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=valid[:, None] & (c < channels)[None, :])


@triton.jit
def _activated(at, bias, c, channels, mask):
    """Loads relu(source + bias)."""
    value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    return tl.where(value < 0, 0.0, value)


@triton.jit
def upsample_kernel(
    source,  # (images, source pixels, source_stride)
    bias,  # (channels,), or None
    residual,  # (images, pixels, residual_stride)
    out,  # (images, pixels, channels)
    height,
    width,
    source_height,
    source_width,
    channels,
    source_stride,
    residual_stride,
    scale_y,  # source pixels in a pixel
    scale_x,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = bilinear(relu(source + bias)), align_corners, + residual."""
    image, p, y, x, valid = _pixels(tl.program_id(0), height, width, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = valid[:, None] & (c < channels)[None, :]
    at = residual + image * height * width * residual_stride + p[:, None] * residual_stride + c[None, :]
    acc = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    py, px = y.to(tl.float32) * scale_y, x.to(tl.float32) * scale_x
    y0, x0 = tl.minimum(py.to(tl.int32), source_height - 1), tl.minimum(px.to(tl.int32), source_width - 1)
    base = source + image * source_height * source_width * source_stride
    for corner in tl.static_range(4):
        sy, sx = tl.minimum(y0 + corner // 2, source_height - 1), tl.minimum(x0 + corner % 2, source_width - 1)
        wy = py - y0.to(tl.float32) if corner // 2 else 1.0 - (py - y0.to(tl.float32))
        wx = px - x0.to(tl.float32) if corner % 2 else 1.0 - (px - x0.to(tl.float32))
        at = base + (sy * source_width + sx)[:, None] * source_stride + c[None, :]
        acc += (wy * wx)[:, None] * _activated(at, bias, c, channels, mask)
    out_at = out + image * height * width * channels + p[:, None] * channels + c[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def upsample_backward_kernel(
    grad_out,  # (images, out pixels, grad_stride)
    source,  # (images, pixels, source_stride)
    bias,  # (channels,), or None
    grad_source,  # (images, pixels, grad_source_stride)
    height,  # of source
    width,
    out_height,
    out_width,
    channels,
    grad_stride,
    source_stride,
    grad_source_stride,
    scale_y,  # source pixels in a pixel of out
    scale_x,
    inverse_y,  # pixels of out in one of source
    inverse_x,
    reach_y,  # the most pixels of out that read one of source
    reach_x,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_source = sum over out's pixels of bilinear weight times grad_out, where source + bias > 0."""
    image, p, y, x, valid = _pixels(tl.program_id(0), height, width, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    # One pixel beyond the corners, against rounding; a pixel too far has weight 0.
    y0 = tl.maximum(((y - 1).to(tl.float32) * inverse_y).to(tl.int32) - 1, 0)
    x0 = tl.maximum(((x - 1).to(tl.float32) * inverse_x).to(tl.int32) - 1, 0)
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    base = grad_out + image * out_height * out_width * grad_stride
    for step in range(reach_y * reach_x):
        oy, ox = y0 + step // reach_x, x0 + step % reach_x
        wy = 1.0 - tl.abs(oy.to(tl.float32) * scale_y - y.to(tl.float32))
        wx = 1.0 - tl.abs(ox.to(tl.float32) * scale_x - x.to(tl.float32))
        inside = valid & (oy < out_height) & (ox < out_width) & (wy > 0) & (wx > 0)
        at = base + (oy * out_width + ox)[:, None] * grad_stride + c[None, :]
        value = tl.load(at, mask=inside[:, None] & (c < channels)[None, :], other=0.0).to(tl.float32)
        acc += tl.where(inside, wy * wx, 0.0)[:, None] * value
    mask = valid[:, None] & (c < channels)[None, :]
    at = source + image * height * width * source_stride + p[:, None] * source_stride + c[None, :]
    acc = tl.where(_activated(at, bias, c, channels, mask) > 0, acc, 0.0)
    first = image * height * width * grad_source_stride
    at = grad_source + first + p[:, None] * grad_source_stride + c[None, :]
    tl.store(at, acc.to(grad_source.dtype.element_ty), mask=mask)


def pool_and_concat(maps: list[Tensor]) -> Tensor:
    """Launches ``pool_kernel`` for maps (B, C_l, H_l, W_l) and returns (B, sum C_l, H, W) on the last map's grid."""
    out = new_rows(maps[-1], sum(level.shape[1] for level in maps))
    for level, pooled in zip(maps, _split_by_level(out, maps), strict=True):
        _pool(level, pooled, backward=False)
    return out


def pool_and_concat_backward(grad_out: Tensor, maps: list[Tensor]) -> list[Tensor]:
    """Computes the gradient of each map from grad_out (B, sum C_l, H, W); only shapes and dtypes of ``maps`` count."""
    grads = [new_rows(level, level.shape[1]) for level in maps]
    for grad, pooled in zip(grads, _split_by_level(grad_out, maps), strict=True):
        _pool(pooled, grad, backward=True)
    return grads


def split_and_upsample(joint: Tensor, bias: Tensor | None, maps: list[Tensor]) -> list[Tensor]:
    """Launches ``upsample_kernel``: bilinear(relu(joint + bias)) + map for each of maps (B, C_l, H_l, W_l).

    joint (B, sum C_l, H, W), bias (sum C_l,): each level reads its own channels.
    """
    outs = [new_rows(level, level.shape[1]) for level in maps]
    for level, pooled, level_bias, out in zip(
        maps, _split_by_level(joint, maps), _biases(bias, maps), outs, strict=True
    ):
        (source, source_stride), (residual, residual_stride) = as_rows(pooled), as_rows(level)
        grid, meta = _grid("upsample", out)
        with on(out.device):
            launched(upsample_kernel)[grid](
                source, level_bias, residual, out, *out.shape[2:], *pooled.shape[2:], out.shape[1],
                source_stride, residual_stride,
                *(_scale(inner, outer) for inner, outer in zip(pooled.shape[2:], out.shape[2:], strict=True)), **meta,
            )  # fmt: skip
    return outs


def split_and_upsample_backward(grad_outs: list[Tensor], joint: Tensor, bias: Tensor | None) -> Tensor:
    """Computes the gradient of joint; bias's is its sum over all pixels, and the maps' gradients are ``grad_outs``."""
    grad = new_rows(joint, joint.shape[1])
    splits = (_split_by_level(joint, grad_outs), _biases(bias, grad_outs), _split_by_level(grad, grad_outs))
    for grad_out, pooled, level_bias, grad_level in zip(grad_outs, *splits, strict=True):
        (rows, stride), (source, source_stride), (out, out_stride) = map(as_rows, (grad_out, pooled, grad_level))
        sizes = list(zip(pooled.shape[2:], grad_out.shape[2:], strict=True))
        # A single source pixel reaches all.
        inverses = [(outer - 1) / (inner - 1) if inner > 1 else float(outer) for inner, outer in sizes]
        grid, meta = _grid("upsample", pooled)
        with on(grad.device):
            launched(upsample_backward_kernel)[grid](
                rows, source, level_bias, out, *pooled.shape[2:], *grad_out.shape[2:], pooled.shape[1],
                stride, source_stride, out_stride, *(_scale(*pair) for pair in sizes), *inverses,
                *(min(outer, int(2 * inverse) + 5) for (_, outer), inverse in zip(sizes, inverses, strict=True)),
                **meta,
            )  # fmt: skip
    return grad


def _biases(bias: Tensor | None, maps: list[Tensor]) -> Sequence[Tensor | None]:
    return [None] * len(maps) if bias is None else bias.split([level.shape[1] for level in maps])


def _pool(source: Tensor, out: Tensor, backward: bool) -> None:
    (source_rows, source_stride), (out_rows, out_stride) = as_rows(source), as_rows(out)
    sizes = zip(out.shape[2:], source.shape[2:], strict=True)
    reaches = (other // size + 2 if other % size else other // size for size, other in sizes)
    grid, meta = _grid("pool", out)
    with on(out.device):
        launched(pool_kernel)[grid](
            source_rows, out_rows, *out.shape[2:], *source.shape[2:], out.shape[1], source_stride, out_stride,
            *reaches, BACKWARD=backward, **meta,
        )  # fmt: skip


def _split_by_level(joint: Tensor, maps: list[Tensor]) -> tuple[Tensor, ...]:
    """Splits ``joint`` into each level's channels, as views of rows."""
    return as_rows(joint)[0].split([level.shape[1] for level in maps], dim=1)


def _scale(inner: int, outer: int) -> float:
    return (inner - 1) / (outer - 1) if outer > 1 else 0.0


def _grid(kernel: str, out: Tensor) -> tuple[tuple[int, int], dict[str, int | bool]]:
    b, channels, height, width = out.shape
    size: Tile = tile(kernel, out.device).within(height * width, channels)
    grid = (b * triton.cdiv(height * width, size.pixels), triton.cdiv(channels, size.channels))
    return grid, {"BLOCK_P": size.pixels, "BLOCK_C": size.channels, **size.options}
