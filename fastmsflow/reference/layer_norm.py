"""Layer normalization over the channels of each pixel, then ReLU."""

import torch.nn.functional as F
from torch import Tensor

LAYER_NORM_EPS = 1e-5


def layer_norm_relu(x: Tensor, weight: Tensor, bias: Tensor, condition: Tensor | None = None) -> Tensor:
    """relu((y - mean) / sqrt(var + 1e-5) * weight + bias) with y = x + condition, mean and var over its channels.

    x (B, C, H, W); weight, bias (C,); condition (1, C, H, W): a map added to every image; (1, C, 1, 1): a bias.
    """
    pixels = (x if condition is None else x + condition).permute(0, 2, 3, 1)
    normed = F.layer_norm(pixels, (x.shape[1],), weight, bias, LAYER_NORM_EPS)
    return F.relu(normed, inplace=True).permute(0, 3, 1, 2)
