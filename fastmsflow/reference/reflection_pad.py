"""Padding by reflection."""

import torch.nn.functional as F
from torch import Tensor


def reflection_pad(x: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    """Mirrors the pixels of x (B, C, H, W) at each edge, without repeating the edge's own.

    ``padding``: pixels to add at (left, right, top, bottom), each fewer than x has in that direction.
    Returns (B, C, top + H + bottom, left + W + right) in x's dtype.
    """
    return F.pad(x, padding, mode="reflect")
