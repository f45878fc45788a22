"""The 3x3 convolution of the subnets: stride 1, zero padding 1."""

import torch.nn.functional as F
from torch import Tensor


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolves x (B, I, H, W) with weight (O, I, 3, 3) and adds bias (O,), which may be in float32: (B, O, H, W)."""
    return F.conv2d(x, weight, None if bias is None else bias.to(weight.dtype), padding=1)
