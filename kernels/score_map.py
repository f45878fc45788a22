"""Aggregates the log-likelihood maps of all levels to two maps at the image's size, in one pass.

The levels' maps are interpolated where they are needed: none of them is stored at the image's size. The image's peak is
an atomic maximum of integers, whose result does not depend on the order of the programs; the integers are ordered as
the floats are whose bits they hold.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import tile
from .launch import launched, on


@triton.jit
def _corners(n, size, scale):
    """Returns lower index, upper index and weight of the upper one, bilinear with align_corners, in float32."""
    position = n.to(tl.float32) * scale
    low = tl.minimum(position.to(tl.int32), size - 1)
    return low, tl.minimum(low + 1, size - 1), position - low.to(tl.float32)


@triton.jit
def _max(x):
    """Returns the maximum, or NaN if there is one, as torch.amax does."""
    return tl.where(tl.max((x != x).to(tl.int32), axis=0) > 0, float("nan"), tl.max(x, axis=0))


@triton.jit
def _as_ordered(bits):
    """Maps the bits of a float to an integer that is ordered as the float is, NaN the largest; and back again."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def level_tops_kernel(
    logps,  # per level (B, h, w) float32
    sizes,  # per level: h w
    tops,  # (levels, B) float32: the maximum of each map
    peaks,  # (B,) int32: gets less than any float
    BLOCK: tl.constexpr,
):
    """tops[level, image] = the maximum of the level's map; resets peaks."""
    image = tl.program_id(1).to(tl.int64)
    for level in tl.static_range(len(logps)):
        if tl.program_id(0) == level:
            top = tl.full((BLOCK,), float("-inf"), tl.float32)
            for start in range(0, sizes[level], BLOCK):
                n = start + tl.arange(0, BLOCK)
                value = tl.load(logps[level] + image * sizes[level] + n, mask=n < sizes[level], other=float("-inf"))
                top = tl.maximum(top, value, propagate_nan=tl.PropagateNan.ALL)
            tl.store(tops + level * tl.num_programs(1) + image, _max(top))
    if tl.program_id(0) == 0:
        tl.store(peaks + image, -0x80000000)


@triton.jit
def score_map_kernel(
    logps,  # per level (B, h, w) float32
    tops,  # (levels, B) float32: the maximum of each map
    heights,  # per level
    widths,  # per level
    scales_y,  # per level: pixels of the level in a pixel of the image
    scales_x,  # likewise
    total,  # (B, H, W) float32: sum of the levels
    likelihood,  # (B, H, W) float32: sum of exp(level - its maximum)
    peaks,  # (B,) int32: the maximum of the total, as an ordered integer
    height,
    width,
    BLOCK: tl.constexpr,
):
    """total = sum over levels of up(logp); likelihood = sum of up(exp(logp - top)); peaks = max of total by image."""
    image = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = n < height * width
    sum_log = tl.zeros((BLOCK,), tl.float32)
    sum_exp = tl.zeros((BLOCK,), tl.float32)
    for level in tl.static_range(len(logps)):
        h, w = heights[level], widths[level]
        y0, y1, fy = _corners(n // width, h, scales_y[level])
        x0, x1, fx = _corners(n % width, w, scales_x[level])
        at = logps[level] + image * h * w
        top = tl.load(tops + level * tl.num_programs(1) + image)
        v00 = tl.load(at + y0 * w + x0, mask=mask, other=0.0)
        v01 = tl.load(at + y0 * w + x1, mask=mask, other=0.0)
        v10 = tl.load(at + y1 * w + x0, mask=mask, other=0.0)
        v11 = tl.load(at + y1 * w + x1, mask=mask, other=0.0)
        sum_log += (1 - fy) * ((1 - fx) * v00 + fx * v01) + fy * ((1 - fx) * v10 + fx * v11)
        e00, e01, e10, e11 = tl.exp(v00 - top), tl.exp(v01 - top), tl.exp(v10 - top), tl.exp(v11 - top)
        sum_exp += (1 - fy) * ((1 - fx) * e00 + fx * e01) + fy * ((1 - fx) * e10 + fx * e11)
    at = image * height * width + n
    tl.store(total + at, sum_log, mask=mask)
    tl.store(likelihood + at, sum_exp, mask=mask)
    peak = _max(tl.where(mask, sum_log, float("-inf")))
    tl.atomic_max(peaks + image, _as_ordered(peak.to(tl.int32, bitcast=True)), sem="relaxed")


@triton.jit
def subtract_peak_kernel(
    total,  # (B, pixels) float32: its image's peak is subtracted
    peaks,  # (B,) int32, as ordered integers
    peak,  # (B,) float32: the peaks as floats
    pixels,
    BLOCK: tl.constexpr,
):
    """total -= its image's peak."""
    image = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = n < pixels
    highest = _as_ordered(tl.load(peaks + image)).to(tl.float32, bitcast=True)
    at = total + image * pixels + n
    tl.store(at, tl.load(at, mask=mask) - highest, mask=mask)
    if tl.program_id(0) == 0:
        tl.store(peak + image, highest)


def score_maps(logp: list[Tensor], image_size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Computes L, A (B, H, W) and peak (B,) of fastmsflow.scoring from logp (B, h_l, w_l) per level, float32."""
    height, width = image_size
    maps = tuple(level.contiguous() for level in logp)
    images, device = maps[0].shape[0], maps[0].device
    total, likelihood = (torch.empty((images, height, width), dtype=torch.float32, device=device) for _ in range(2))
    tops = torch.empty((len(maps), images), dtype=torch.float32, device=device)
    peaks = torch.empty(images, dtype=torch.int32, device=device)
    peak = torch.empty(images, dtype=torch.float32, device=device)
    size = tile("score_map", device)
    grid = (triton.cdiv(height * width, size.pixels), images)
    heights, widths = zip(*(level.shape[1:] for level in maps), strict=True)
    sizes = tuple(h * w for h, w in zip(heights, widths, strict=True))
    scales_y = tuple((h - 1) / max(height - 1, 1) for h in heights)
    scales_x = tuple((w - 1) / max(width - 1, 1) for w in widths)
    meta = {"BLOCK": size.pixels, **size.options}
    with on(device):
        launched(level_tops_kernel)[(len(maps), images)](maps, sizes, tops, peaks, **meta)
        launched(score_map_kernel)[grid](
            maps, tops, heights, widths, scales_y, scales_x, total, likelihood, peaks, height, width, **meta
        )
        launched(subtract_peak_kernel)[grid](total, peaks, peak, height * width, **meta)
    return total, likelihood, peak
