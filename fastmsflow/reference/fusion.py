"""The fusion subnet's way of carrying information between the levels: pool to one grid, and back up."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .conv3x3 import conv3x3


def pool_and_concat(maps: Sequence[Tensor]) -> Tensor:
    """Averages every (B, C_l, H_l, W_l) to the last level's grid and concatenates the levels: (B, sum C_l, H, W)."""
    height, width = maps[-1].shape[-2:]
    return torch.cat([F.adaptive_avg_pool2d(m, (height, width)) for m in maps], dim=1)


def split_and_upsample(joint: Tensor, bias: Tensor | None, maps: Sequence[Tensor]) -> list[Tensor]:
    """Splits relu(joint + bias) by level, interpolates to each level's grid and adds the level's own map.

    joint (B, sum C_l, H, W); ``bias`` (sum C_l,): the part of joint that its convolution left out; maps
    (B, C_l, H_l, W_l), of which the results have the shapes. The interpolation is bilinear with align_corners.
    """
    if bias is not None:
        joint = joint + bias.to(joint.dtype)[:, None, None]
    levels = joint.relu().split([m.shape[1] for m in maps], dim=1)
    return [
        F.interpolate(level, size=m.shape[-2:], mode="bilinear", align_corners=True) + m
        for level, m in zip(levels, maps, strict=True)
    ]


def conv3x3_split_and_upsample(hidden: Tensor, weight: Tensor, bias: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
    """Computes ``split_and_upsample`` with joint = conv3x3(hidden, weight, bias)."""
    return split_and_upsample(conv3x3(hidden, weight, bias), None, maps)
