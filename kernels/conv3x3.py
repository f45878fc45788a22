"""3x3 convolution, stride 1, zero padding 1, as an implicit matrix product on rows; and its two gradients.

A program multiplies a tile of one image's pixels, shifted by each of the nine taps, with a tile of the weights; pixels
outside the image read as 0. Weights are (O, I, 3, 3) in channels-last memory, so a tap's inputs are contiguous. The
gradient by x is the same product with the taps in reverse order and O and I exchanged.

Sums are in float32; ``precision`` says how float32 operands are multiplied: "ieee" or "tf32".
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .channels_last import as_rows, new_rows
from .configs import product_tile
from .launch import INTERPRETED, launched, on

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr):
    """Returns acc + a b."""
    # The interpreter multiplies the bit patterns of bfloat16, so there the operands are widened.
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def image_tile(program, height, width, BLOCK_M: tl.constexpr):
    """Returns image, first row of the tile (int64), row offsets, y and x of the pixels, which are in the image."""
    tiles = tl.cdiv(height * width, BLOCK_M)
    image, tile = program // tiles, program % tiles
    m = tl.arange(0, BLOCK_M)
    pixel = tile * BLOCK_M + m
    row = image.to(tl.int64) * (height * width) + tile * BLOCK_M
    return image, row, m, pixel // width, pixel % width, pixel < height * width


@triton.jit
def shifted(tap, m, y, x, valid, height, width):
    """Returns the pixels under ``tap`` (0 to 8): row offsets, and which of them are in the image."""
    dy, dx = tap // 3 - 1, tap % 3 - 1
    inside = valid & (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
    return m + dy * width + dx, inside


@triton.jit
def convolve(
    acc,  # (BLOCK_M, columns) float32
    rest,  # (BLOCK_M, more columns) float32, or None: together they can be wide without being a power of 2
    inputs,  # (rows, stride)
    weight,
    outputs,  # the columns' numbers among the weight's outputs
    rest_outputs,
    last,  # how many outputs there are
    row,
    m,
    y,
    x,
    valid,
    height,
    width,
    channels,  # of the inputs
    stride,
    weight_in,  # steps in weight: to the next input,
    weight_out,  # to the next output,
    weight_tap,  # to the next tap
    REVERSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Returns acc, and rest if there is one, each plus the tile's sum over taps and channels of input times weight."""
    k = tl.arange(0, BLOCK_K)
    blocks = tl.cdiv(channels, BLOCK_K)
    base = inputs + row * stride
    for step in range(9 * blocks):
        tap, first = step // blocks, (step % blocks) * BLOCK_K
        at, inside = shifted(tap, m, y, x, valid, height, width)
        in_range = first + k < channels
        mask = inside[:, None] & in_range[None, :]
        a = tl.load(base + at[:, None] * stride + (first + k)[None, :], mask=mask, other=0.0)
        weight_at = weight + (8 - tap if REVERSED else tap) * weight_tap + (first + k)[:, None] * weight_in
        mask = in_range[:, None] & (outputs < last)[None, :]
        acc = multiply(a, tl.load(weight_at + outputs[None, :] * weight_out, mask=mask, other=0.0), acc, PRECISION)
        if rest is not None:
            mask = in_range[:, None] & (rest_outputs < last)[None, :]
            b = tl.load(weight_at + rest_outputs[None, :] * weight_out, mask=mask, other=0.0)
            rest = multiply(a, b, rest, PRECISION)
    # Triton 3.6 cannot return a None among others.
    if rest is not None:
        return acc, rest
    else:  # noqa: RET505 - compiled, the branch not taken vanishes
        return acc


@triton.jit
def conv3x3_kernel(
    inputs,  # (rows, stride)
    weight,
    bias,  # (outputs,) or None
    out,  # (rows, outputs)
    height,
    width,
    channels,
    outputs,
    stride,
    weight_in,
    weight_out,
    weight_tap,
    REVERSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[y, x, o] = bias[o] + sum over taps and channels of inputs[y + dy, x + dx, i] weight[o, i, tap]."""
    _, row, m, y, x, valid = image_tile(tl.program_id(0), height, width, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = convolve(
        acc, None, inputs, weight, n, None, outputs, row, m, y, x, valid, height, width, channels, stride,
        weight_in, weight_out, weight_tap, REVERSED, PRECISION, BLOCK_K,
    )  # fmt: skip
    if bias is not None:
        acc += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    out_at = out + row * outputs + m[:, None] * outputs + n[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=valid[:, None] & (n < outputs)[None, :])


@triton.jit
def conv3x3_weight_kernel(
    inputs,  # (rows, stride)
    grad_out,  # (rows, grad_stride)
    partial,  # (splits, outputs, 9, channels) float32
    rows,
    height,
    width,
    channels,
    outputs,
    stride,
    grad_stride,
    steps,  # tiles of rows in a split
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """partial[split, o, tap, i] = sum over the split's rows of grad_out[row, o] inputs[row under the tap, i].

    A program computes BLOCK_M outputs by BLOCK_N inputs of one tap, BLOCK_K rows at a time.
    """
    tap, split = tl.program_id(2) % 9, tl.program_id(2) // 9
    o = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    i = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(steps):
        row = (split * steps + step).to(tl.int64) * BLOCK_K
        valid = row + r < rows
        pixel = ((row + r) % (height * width)).to(tl.int32)
        at, inside = shifted(tap, r, pixel // width, pixel % width, valid, height, width)
        grad = tl.load(
            grad_out + row * grad_stride + r[:, None] * grad_stride + o[None, :],
            mask=valid[:, None] & (o < outputs)[None, :],
            other=0.0,
        )
        value = tl.load(
            inputs + row * stride + at[:, None] * stride + i[None, :],
            mask=inside[:, None] & (i < channels)[None, :],
            other=0.0,
        )
        acc = multiply(tl.trans(grad), value, acc, PRECISION)
    partial_at = partial + split.to(tl.int64) * outputs * 9 * channels + (o[:, None] * 9 + tap) * channels + i[None, :]
    tl.store(partial_at, acc, mask=(o < outputs)[:, None] & (i < channels)[None, :])


def exact(x: Tensor, precision: str) -> bool:
    """Tells whether float32 operands are multiplied as they are."""
    return x.dtype == torch.float32 and precision == "ieee"


def weight_rows(weight: Tensor) -> tuple[Tensor, int, int]:
    """Returns weight (O, I, 3, 3) with its inputs contiguous, the step to the next output and to the next tap.

    The tensor is the weight itself if its memory is like that (channels-last, and slices of its inputs), else a copy.
    """
    so, si, sy, sx = weight.stride()
    if (si == 1 or weight.shape[1] == 1) and sy == 3 * sx:
        return weight, so, sx
    channels = weight.shape[1]
    return weight.permute(0, 2, 3, 1).contiguous(), 9 * channels, channels


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, precision: str) -> Tensor:
    """Launches ``conv3x3_kernel`` and returns (B, O, H, W) of x's dtype.

    x (B, I, H, W), weight (O, I, 3, 3), bias (O,) or None.
    """
    weight, step_out, step_tap = weight_rows(weight)
    return _conv3x3(
        x, weight, bias, outputs=len(weight), steps=(1, step_out, step_tap), reverse_taps=False, precision=precision
    )


def conv3x3_input_gradient(grad_out: Tensor, weight: Tensor, precision: str) -> Tensor:
    """Computes the gradient of x (B, I, H, W), of grad_out's dtype, from grad_out (B, O, H, W), weight (O, I, 3, 3)."""
    inputs = weight.shape[1]
    weight, step_out, step_tap = weight_rows(weight)
    return _conv3x3(
        grad_out, weight, None, outputs=inputs, steps=(step_out, 1, step_tap), reverse_taps=True, precision=precision
    )


def conv3x3_weight_gradient(x: Tensor, grad_out: Tensor, precision: str) -> Tensor:
    """Launches ``conv3x3_weight_kernel``: the gradient of weight (O, I, 3, 3) float32, in channels-last memory.

    x (B, I, H, W), grad_out (B, O, H, W).
    """
    b, channels, height, width = x.shape
    outputs, rows = grad_out.shape[1], b * height * width
    (x_rows, stride), (grad_rows, grad_stride) = as_rows(x), as_rows(grad_out)
    size = product_tile("conv3x3_weight", x.device, exact(x, precision)).within(outputs, channels, rows)
    grid = (triton.cdiv(outputs, size.m), triton.cdiv(channels, size.n))
    tiles = triton.cdiv(rows, size.k)
    # Enough programs for a large chip, each with some tiles to sum. Fixed by the shape: so is the order of the sum.
    splits = max(1, min(tiles // 4, triton.cdiv(512, grid[0] * grid[1] * 9)))
    partial = torch.empty((splits, outputs, 9, channels), dtype=torch.float32, device=x.device)
    programs = (*grid, 9 * splits)
    with on(x.device):
        launched(conv3x3_weight_kernel)[programs](
            x_rows, grad_rows, partial, rows, height, width, channels, outputs, stride, grad_stride,
            triton.cdiv(tiles, splits), PRECISION=precision, **size.options,
        )  # fmt: skip
    return partial.sum(dim=0).view(outputs, 3, 3, channels).permute(0, 3, 1, 2)


def _conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    outputs: int,
    steps: tuple[int, int, int],
    reverse_taps: bool,
    precision: str,
) -> Tensor:
    """Launches ``conv3x3_kernel``; ``steps``: to the weight's next input, output and tap."""
    b, channels, height, width = x.shape
    x_rows, stride = as_rows(x)
    out = new_rows(x, outputs)
    size = product_tile("conv3x3", x.device, exact(x, precision)).within(height * width, outputs, channels)
    grid = (b * triton.cdiv(height * width, size.m), triton.cdiv(outputs, size.n))
    with on(x.device):
        launched(conv3x3_kernel)[grid](
            x_rows, weight, bias, out, height, width, channels, outputs, stride, *steps,
            REVERSED=reverse_taps, PRECISION=precision, **size.options,
        )  # fmt: skip
    return out
