"""3x3 convolution, LayerNorm over its outputs and ReLU in one pass: a program holds all outputs of its pixels."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .channels_last import as_rows, new_rows
from .configs import product_tile
from .conv3x3 import convolve, exact, image_tile, weight_rows
from .launch import launched, on

MAX_COLUMNS = 320


@triton.jit
def _add_condition(acc, condition, m, row, n, outputs, pixels, valid):
    """Adds the condition's map, the same for every image, or a bias, of one pixel, the same for every row."""
    pixel = ((row + m) % pixels).to(tl.int32)
    mask = valid[:, None] & (n < outputs)[None, :]
    return acc + tl.load(condition + pixel[:, None] * outputs + n[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _finish(acc, mean, scale, norm_weight, norm_bias, out, hidden, row, m, n, outputs, valid):
    """Stores relu(layer norm), and the norm's input if there is a place for it."""
    mask = valid[:, None] & (n < outputs)[None, :]
    at = row * outputs + m[:, None] * outputs + n[None, :]
    if hidden is not None:
        tl.store(hidden + at, acc.to(hidden.dtype.element_ty), mask=mask)
    w = tl.load(norm_weight + n, mask=n < outputs, other=0.0).to(tl.float32)
    b = tl.load(norm_bias + n, mask=n < outputs, other=0.0).to(tl.float32)
    normed = (acc - mean[:, None]) * scale[:, None] * w[None, :] + b[None, :]
    tl.store(out + at, tl.where(normed < 0, 0.0, normed).to(out.dtype.element_ty), mask=mask)


@triton.jit
def conv3x3_layer_norm_relu_kernel(
    inputs,  # (rows, stride)
    weight,
    condition,  # (pixels, outputs), added to every image; one pixel: to every row
    norm_weight,  # (outputs,)
    norm_bias,  # (outputs,)
    out,  # (rows, outputs)
    hidden,  # (rows, outputs): the convolution plus the condition; or None
    mean,  # (rows,) float32, or None
    rstd,  # (rows,) float32, or None
    height,
    width,
    channels,
    outputs,
    pixels,
    stride,
    weight_out,
    weight_tap,
    eps,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REST_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = relu((v - mean) rstd norm_weight + norm_bias) with v = conv3x3(inputs, weight) + condition.

    mean and rstd = 1 / sqrt(var + eps) of v are over the outputs of each pixel.
    """
    _, row, m, y, x, valid = image_tile(tl.program_id(0), height, width, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if REST_N > 0:
        rest_n = BLOCK_N + tl.arange(0, REST_N)
        acc, rest = convolve(
            acc, tl.zeros((BLOCK_M, REST_N), tl.float32), inputs, weight, n, rest_n, outputs, row, m, y, x, valid,
            height, width, channels, stride, 1, weight_out, weight_tap, False, PRECISION, BLOCK_K,
        )  # fmt: skip
    else:
        acc = convolve(
            acc, None, inputs, weight, n, None, outputs, row, m, y, x, valid,
            height, width, channels, stride, 1, weight_out, weight_tap, False, PRECISION, BLOCK_K,
        )  # fmt: skip
    acc = _add_condition(acc, condition, m, row, n, outputs, pixels, valid)
    total = tl.sum(acc, axis=1)
    if REST_N > 0:
        rest = _add_condition(rest, condition, m, row, rest_n, outputs, pixels, valid)
        total += tl.sum(rest, axis=1)
    average = total / outputs
    centered = tl.where((n < outputs)[None, :], acc - average[:, None], 0.0)
    square = tl.sum(centered * centered, axis=1)
    if REST_N > 0:
        centered = tl.where((rest_n < outputs)[None, :], rest - average[:, None], 0.0)
        square += tl.sum(centered * centered, axis=1)
    scale = 1.0 / tl.sqrt(square / outputs + eps)
    _finish(acc, average, scale, norm_weight, norm_bias, out, hidden, row, m, n, outputs, valid)
    if REST_N > 0:
        _finish(rest, average, scale, norm_weight, norm_bias, out, hidden, row, m, rest_n, outputs, valid)
    if mean is not None:
        tl.store(mean + row + m, average, mask=valid)
        tl.store(rstd + row + m, scale, mask=valid)


def conv3x3_layer_norm_relu(
    x: Tensor,
    weight: Tensor,
    condition: Tensor,
    norm: tuple[Tensor, Tensor],
    *,
    eps: float,
    precision: str,
    for_backward: bool,
) -> list[Tensor]:
    """Launches ``conv3x3_layer_norm_relu_kernel``: relu(layer_norm(conv3x3(x, weight) + condition)).

    x (B, I, H, W), weight (O, I, 3, 3), condition (1, O, H, W), or a bias (1, O, 1, 1); ``norm``: the norm's weight and
    bias, (O,) each; ``precision``: see kernels.conv3x3.

    Returns the result (B, O, H, W). If ``for_backward``, the norm's input (B, O, H, W), its mean and 1 / std, (B H W,)
    float32 each, follow.
    """
    b, channels, height, width = x.shape
    outputs = len(weight)
    x_rows, stride = as_rows(x)
    weight, step_out, step_tap = weight_rows(weight)
    condition = condition.contiguous(memory_format=torch.channels_last)
    out = new_rows(x, outputs)
    saved = []
    if for_backward:
        statistics = (torch.empty(b * height * width, dtype=torch.float32, device=x.device) for _ in range(2))
        saved = [new_rows(x, outputs), *statistics]
    size = product_tile("conv3x3_layer_norm", x.device, exact(x, precision)).within(height * width, outputs, channels)
    wide, rest = columns(outputs)
    options = {**size.options, "BLOCK_N": wide}
    with on(x.device):
        launched(conv3x3_layer_norm_relu_kernel)[(b * triton.cdiv(height * width, size.m),)](
            x_rows, weight, condition, *norm, out, *(saved or (None, None, None)),
            height, width, channels, outputs, condition.shape[2] * condition.shape[3], stride, step_out, step_tap, eps,
            PRECISION=precision, REST_N=rest, **options,
        )  # fmt: skip
    return [out, *saved]


def columns(outputs: int) -> tuple[int, int]:
    """Returns two powers of 2, the second may be 0, that just hold ``outputs`` columns: 320 = 256 + 64."""
    wide = triton.next_power_of_2(outputs)
    if wide == outputs or outputs < 32:
        return max(16, wide), 0
    rest = max(16, triton.next_power_of_2(outputs - wide // 2))
    return (wide // 2, rest) if rest < wide // 2 else (wide, 0)


def fuses_layer_norm(outputs: int) -> bool:
    """Tells whether a program can hold that many outputs of its pixels; of more, registers spill to memory."""
    return sum(columns(outputs)) <= MAX_COLUMNS
