"""Aggregates the levels' log-likelihood maps at the image's size, in two ways (arXiv 2308.15300)."""

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor


def upsample(level_map: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Interpolates (B, h, w) to (B, H, W), bilinear, align_corners=True."""
    return F.interpolate(level_map[:, None], size=image_size, mode="bilinear", align_corners=True)[:, 0]


def multiplicative_log_likelihood(logp: Sequence[Tensor], image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """sum_l up(logp_l) minus its maximum per image, (B, H, W), at most 0; and that maximum, (B,)."""
    total = reduce(torch.add, (upsample(level, image_size) for level in logp))
    peak = total.amax(dim=(1, 2))
    return total - peak[:, None, None], peak


def additive_likelihood(logp: Sequence[Tensor], image_size: tuple[int, int]) -> Tensor:
    """sum_l up(exp(logp_l - its maximum per image)): (B, H, W), between 0 and the number of levels."""
    likelihoods = ((level - level.amax(dim=(1, 2), keepdim=True)).exp() for level in logp)
    return reduce(torch.add, (upsample(level, image_size) for level in likelihoods))


def score_maps(logp: Sequence[Tensor], image_size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Computes L (B, H, W), A (B, H, W) and peak (B,) of fastmsflow.scoring from logp (B, h_l, w_l) per level."""
    log_likelihood, peak = multiplicative_log_likelihood(logp, image_size)
    return log_likelihood, additive_likelihood(logp, image_size), peak
