"""LayerNorm over the channels of each pixel, then ReLU; before it, optionally, the condition's map is added.

A map of one pixel, a convolution's bias, is added to every pixel. A program holds whole rows in registers. Backward, a
program takes LOOP tiles of rows one after the other and writes one partial sum of the parameters' gradients, so that
the sum's order never changes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .channels_last import as_rows, new_rows
from .configs import tile
from .launch import launched, on

LOOP = 8


@triton.jit
def _rows(block, rows, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Returns first row (int64), row offsets, columns, mask of the tile, mask of the rows."""
    row = block.to(tl.int64) * BLOCK_P
    p = tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    valid = row + p < rows
    return row, p, c, valid[:, None] & (c < channels)[None, :], valid


@triton.jit
def _load(x, condition, row, p, c, mask, pixels, channels, x_stride):
    """Loads x plus the condition's map, in float32; 0 outside the mask."""
    value = tl.load(x + row * x_stride + p[:, None] * x_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
    if condition is not None:
        pixel = ((row + p) % pixels).to(tl.int32)
        value += tl.load(condition + pixel[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def layer_norm_relu_kernel(
    x,  # (rows, x_stride)
    condition,  # (pixels, channels), added to every image; one pixel: to every row; or None
    weight,  # (channels,)
    bias,  # (channels,)
    y,  # (rows, channels)
    mean,  # (rows,) float32
    rstd,  # (rows,) float32
    rows,
    pixels,
    channels,
    x_stride,
    eps,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = relu((v - mean) rstd weight + bias) with v = x + condition; mean and rstd = 1 / sqrt(var + eps): of a row."""
    row, p, c, mask, valid = _rows(tl.program_id(0), rows, channels, BLOCK_P, BLOCK_C)
    value = _load(x, condition, row, p, c, mask, pixels, channels, x_stride)
    average = tl.sum(value, axis=1) / channels
    centered = tl.where(mask, value - average[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=1) / channels + eps)
    w = tl.load(weight + c, mask=c < channels, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)
    out = centered * scale[:, None] * w[None, :] + b[None, :]
    out = tl.where(out < 0, 0.0, out)
    tl.store(y + row * channels + p[:, None] * channels + c[None, :], out.to(y.dtype.element_ty), mask=mask)
    tl.store(mean + row + p, average, mask=valid)
    tl.store(rstd + row + p, scale, mask=valid)


@triton.jit
def layer_norm_relu_backward_kernel(
    grad_y,  # (rows, grad_stride)
    x,  # as for layer_norm_relu_kernel
    condition,
    weight,
    bias,
    mean,
    rstd,
    grad_x,  # (rows, channels)
    partial_weight,  # (programs, channels) float32
    partial_bias,  # likewise
    rows,
    pixels,
    channels,
    x_stride,
    grad_stride,
    LOOP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx = rstd (d - mean(d) - n mean(d n)) with n the normed value and d = dy weight where y > 0; the means: of a row.

    dweight = sum of dy n and dbias = sum of dy over the rows where y > 0.
    """
    c = tl.arange(0, BLOCK_C)
    w = tl.load(weight + c, mask=c < channels, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)
    sum_weight = tl.zeros((BLOCK_C,), tl.float32)
    sum_bias = tl.zeros((BLOCK_C,), tl.float32)
    for step in range(LOOP):
        row, p, _, mask, valid = _rows(tl.program_id(0) * LOOP + step, rows, channels, BLOCK_P, BLOCK_C)
        value = _load(x, condition, row, p, c, mask, pixels, channels, x_stride)
        scale = tl.load(rstd + row + p, mask=valid, other=0.0)[:, None]
        normed = tl.where(mask, (value - tl.load(mean + row + p, mask=valid, other=0.0)[:, None]) * scale, 0.0)
        grad_at = grad_y + row * grad_stride + p[:, None] * grad_stride + c[None, :]
        grad = tl.load(grad_at, mask=mask, other=0.0).to(tl.float32)
        # The same expression as forward's, so that the same pixels are cut off.
        grad = tl.where(normed * w[None, :] + b[None, :] > 0, grad, 0.0)
        sum_weight += tl.sum(grad * normed, axis=0)
        sum_bias += tl.sum(grad, axis=0)
        scaled = grad * w[None, :]
        along = tl.sum(scaled * normed, axis=1)[:, None] / channels
        out = (scaled - tl.sum(scaled, axis=1)[:, None] / channels - normed * along) * scale
        tl.store(
            grad_x + row * channels + p[:, None] * channels + c[None, :], out.to(grad_x.dtype.element_ty), mask=mask
        )
    at = tl.program_id(0).to(tl.int64) * channels + c
    tl.store(partial_weight + at, sum_weight, mask=c < channels)
    tl.store(partial_bias + at, sum_bias, mask=c < channels)


def layer_norm_relu(
    x: Tensor, condition: Tensor | None, weight: Tensor, bias: Tensor, *, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches ``layer_norm_relu_kernel``: relu(layer_norm(x + condition)), and mean and 1 / std of each pixel.

    x (B, C, H, W); condition (1, C, H, W) or (1, C, 1, 1); weight, bias (C,). Returns (B, C, H, W) of x's dtype, then
    two (B H W,) float32.
    """
    b, channels, h, w = x.shape
    size = tile("layer_norm", x.device).rows_of(channels)
    x_rows, stride = as_rows(x)
    y = new_rows(x, channels)
    mean, rstd = (torch.empty(b * h * w, dtype=torch.float32, device=x.device) for _ in range(2))
    with on(x.device):
        launched(layer_norm_relu_kernel)[(triton.cdiv(b * h * w, size.pixels),)](
            x_rows, _map(condition), weight, bias, y, mean, rstd, b * h * w, _pixels(condition), channels, stride, eps,
            BLOCK_P=size.pixels, BLOCK_C=size.channels, **size.options,
        )  # fmt: skip
    return y, mean, rstd


def layer_norm_relu_backward(
    grad_y: Tensor,
    x: Tensor,
    condition: Tensor | None,
    weight: Tensor,
    *,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches ``layer_norm_relu_backward_kernel``: the gradients of x (of its dtype), weight and bias (C,) float32.

    mean, rstd: as ``layer_norm_relu`` returned them. The condition's gradient is x's, summed over the images.
    """
    b, channels, h, w = x.shape
    size = tile("layer_norm_backward", x.device).rows_of(channels)
    x_rows, stride = as_rows(x)
    grad_rows, grad_stride = as_rows(grad_y)
    grad_x = new_rows(x, channels)
    programs = triton.cdiv(b * h * w, size.pixels * LOOP)
    partial_weight, partial_bias = (
        torch.empty((programs, channels), dtype=torch.float32, device=x.device) for _ in range(2)
    )
    with on(x.device):
        launched(layer_norm_relu_backward_kernel)[(programs,)](
            grad_rows, x_rows, _map(condition), weight, bias, mean, rstd, grad_x, partial_weight, partial_bias,
            b * h * w, _pixels(condition), channels, stride, grad_stride,
            LOOP=LOOP, BLOCK_P=size.pixels, BLOCK_C=size.channels, **size.options,
        )  # fmt: skip
    return grad_x, partial_weight.sum(dim=0), partial_bias.sum(dim=0)


def _map(condition: Tensor | None) -> Tensor | None:
    return None if condition is None else condition.contiguous(memory_format=torch.channels_last)


def _pixels(condition: Tensor | None) -> int:
    return 1 if condition is None else condition.shape[2] * condition.shape[3]
