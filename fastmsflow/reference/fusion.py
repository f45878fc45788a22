"""How the fusion subnet carries information between the levels: pool to one grid, and back up."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

OUTPUT_LIMIT = 1e6


def output_limit(dtype: torch.dtype) -> float:
    """The bound of the fusion flow's output: 1e6, or what the dtype holds (float16: 65504)."""
    return min(OUTPUT_LIMIT, torch.finfo(dtype).max)


def clamp_output(z: Tensor) -> Tensor:
    """Bounds the fusion flow's output."""
    return z.clamp(-output_limit(z.dtype), output_limit(z.dtype))


def pool_and_concat(maps: Sequence[Tensor]) -> Tensor:
    """Adaptive average pool of every (B, C_l, H_l, W_l) to the last level's grid, concatenated: (B, sum C_l, H, W)."""
    height, width = maps[-1].shape[-2:]
    return torch.cat([F.adaptive_avg_pool2d(m, (height, width)) for m in maps], dim=1)


def split_and_upsample(joint: Tensor, bias: Tensor | None, maps: Sequence[Tensor]) -> list[Tensor]:
    """The inverse journey: relu(joint + bias) split by level, bilinear (align_corners) to each level's grid, plus the
    level's own map. ``bias`` (sum C_l,): where the convolution left it out."""
    if bias is not None:
        joint = joint + bias.to(joint.dtype)[:, None, None]
    parts = joint.relu().split([m.shape[1] for m in maps], dim=1)
    return [
        F.interpolate(part, size=m.shape[-2:], mode="bilinear", align_corners=True) + m
        for part, m in zip(parts, maps, strict=True)
    ]
