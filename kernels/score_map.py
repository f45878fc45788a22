"""Log-likelihood maps of all levels -> the two aggregated maps at the image's size, in one pass.

The levels' maps are interpolated where they are needed: none of them exists at the image's size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launched, on
from .tables import tile


@triton.jit
def _corners(n, size, scale):
    """Bilinear, align_corners: -> lower index, upper index, weight of the upper one; in float32, as PyTorch does."""
    position = n.to(tl.float32) * scale
    low = tl.minimum(position.to(tl.int32), size - 1)
    return low, tl.minimum(low + 1, size - 1), position - low.to(tl.float32)


@triton.jit
def score_map_kernel(
    logps,  # per level (B, h, w) float32
    tops,  # per level (B,) float32: the maximum of each image
    heights,  # per level
    widths,  # per level
    scales_y,  # per level: pixels of the level in a pixel of the image
    scales_x,  # likewise
    total,  # (B, H, W) float32: sum of the levels
    likelihood,  # (B, H, W) float32: sum of exp(level - its maximum)
    height,
    width,
    BLOCK: tl.constexpr,
):
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
        top = tl.load(tops[level] + image)
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


def score_maps(logp: list[Tensor], image_size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """logp (B, h_l, w_l) per level, float32 -> (L, A), each (B, H, W), and peak (B,): see fastmsflow.scoring."""
    height, width = image_size
    maps = tuple(level.contiguous() for level in logp)
    tops = tuple(level.amax(dim=(1, 2)) for level in maps)
    total, likelihood = (
        torch.empty((maps[0].shape[0], height, width), dtype=torch.float32, device=maps[0].device) for _ in range(2)
    )
    size = tile("score_map", maps[0].device)
    grid = (triton.cdiv(height * width, size.pixels), maps[0].shape[0])
    heights, widths = zip(*(level.shape[1:] for level in maps), strict=True)
    scales_y = tuple((h - 1) / max(height - 1, 1) for h in heights)
    scales_x = tuple((w - 1) / max(width - 1, 1) for w in widths)
    with on(total.device):
        launched(score_map_kernel)[grid](
            maps, tops, heights, widths, scales_y, scales_x, total, likelihood, height, width,
            BLOCK=size.pixels, **size.options,
        )  # fmt: skip
    peak = total.amax(dim=(1, 2))
    return total.sub_(peak[:, None, None]), likelihood, peak
