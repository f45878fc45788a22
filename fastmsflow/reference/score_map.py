"""Aggregates the levels' log-likelihood maps at the image's size, in two ways (arXiv 2308.15300)."""

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor


def upsample(level_map: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Interpolates (B, h, w) to (B, H, W), bilinear, align_corners=True."""
    return F.interpolate(level_map[:, None], size=image_size, mode="bilinear", align_corners=True)[:, 0]


def score_maps(logp: Sequence[Tensor], image_size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Computes L (B, H, W), A (B, H, W) and peak (B,) of fastmsflow.scoring from logp (B, h_l, w_l) per level.

    L is at most 0, A between 0 and the number of levels.
    """
    total = reduce(torch.add, (upsample(level, image_size) for level in logp))
    peak = total.amax(dim=(1, 2))
    likelihoods = ((level - level.amax(dim=(1, 2), keepdim=True)).exp() for level in logp)
    additive = reduce(torch.add, (upsample(level, image_size) for level in likelihoods))
    return total - peak[:, None, None], additive, peak
