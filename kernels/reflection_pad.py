"""Padding by reflection, channels-last in and out: each pixel of the padded image copies the channels of its source.

ATen's CUDA kernel for this knows channels-first tensors alone, which costs two copies from one layout to the other. The
kernel only copies: bias and ReLU of the convolution before are in that convolution's launch, where they move no byte,
and the image's normalization before the first padding moves 2% of an inference's bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .channels_last import as_rows
from .configs import tile
from .launch import launched, on


@triton.jit
def _tile(program, pixels, BLOCK_P: tl.constexpr):
    """Returns image (int64), the tile's pixels in that image, and whether each exists."""
    tiles = tl.cdiv(pixels, BLOCK_P)
    p = program % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    return (program // tiles).to(tl.int64), p, p < pixels


@triton.jit
def _reflected(n, size):
    """Returns the index in 0 to size - 1 that lies as far behind an edge as ``n`` lies in front of it."""
    n = tl.abs(n)
    return tl.where(n < size, n, 2 * (size - 1) - n)


@triton.jit
def reflection_pad_kernel(
    source,  # (images, height * width, stride)
    out,  # (images, out_height * out_width, channels)
    height,
    width,
    out_height,
    out_width,
    channels,
    stride,
    left,
    top,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[y, x] = source[reflected(y - top), reflected(x - left)]."""
    image, p, valid = _tile(tl.program_id(0), out_height * out_width, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = valid[:, None] & (c < channels)[None, :]
    y, x = _reflected(p // out_width - top, height), _reflected(p % out_width - left, width)
    source_at = source + image * height * width * stride + (y * width + x)[:, None] * stride + c[None, :]
    out_at = out + image * out_height * out_width * channels + p[:, None] * channels + c[None, :]
    tl.store(out_at, tl.load(source_at, mask=mask, other=0.0), mask=mask)


def reflection_pad(x: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    """Launches ``reflection_pad_kernel`` and returns (B, C, top + H + bottom, left + W + right) of x's dtype.

    x (B, C, H, W); ``padding``: left, right, top, bottom.
    """
    b, channels, height, width = x.shape
    left, right, top, bottom = padding
    source, stride = as_rows(x)
    out_height, out_width = top + height + bottom, left + width + right
    out = torch.empty((b, out_height, out_width, channels), dtype=x.dtype, device=x.device).permute(0, 3, 1, 2)
    size = tile("reflection_pad", x.device)
    columns = min(size.channels, triton.next_power_of_2(channels))
    # Short rows, as an image's three channels, are taken many at a time.
    pixels = size.pixels * size.channels // columns
    grid = (b * triton.cdiv(out_height * out_width, pixels), triton.cdiv(channels, columns))
    with on(x.device):
        launched(reflection_pad_kernel)[grid](
            source, out, height, width, out_height, out_width, channels, stride, left, top,
            BLOCK_P=pixels, BLOCK_C=columns, **size.options,
        )  # fmt: skip
    return out
