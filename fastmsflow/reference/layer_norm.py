"""Layer normalisation over the channels of each pixel, then ReLU."""

import torch.nn.functional as F
from torch import Tensor

LAYER_NORM_EPS = 1e-5


def layer_norm_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """relu((x - mean) / sqrt(var + 1e-5) * weight + bias), mean and var over C of x (B, C, H, W); weight, bias (C,)."""
    pixels = x.permute(0, 2, 3, 1)
    normed = F.layer_norm(pixels, (x.shape[1],), weight, bias, LAYER_NORM_EPS)
    return F.relu(normed).permute(0, 3, 1, 2)
