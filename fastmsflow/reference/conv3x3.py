"""The 3x3 convolutions of the subnets: stride 1, zero padding 1."""

import torch.nn.functional as F
from torch import Tensor


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (B, I, H, W), weight (O, I, 3, 3), bias (O,) -> (B, O, H, W)."""
    return F.conv2d(x, weight, bias, padding=1)
