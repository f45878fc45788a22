"""The convolution, addition and ReLU of the frozen extractor."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Geometry(NamedTuple):
    """Says how a convolution's window moves, in the order of ``torch.nn.functional.conv2d``'s arguments.

    Pairs are (vertical, horizontal), in pixels. ``padding`` is by zeros.
    """

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


def convolution_relu(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, *, residual: Tensor | None = None
) -> Tensor:
    """relu(conv2d(x, weight) + bias + residual).

    x (B, I, H, W), weight (O, I / groups, h, w), bias (O,) and residual (B, O, H', W') of one dtype, which is the
    result's too; (B, O, H', W').
    """
    out = F.conv2d(x, weight, bias, *geometry)
    if residual is not None:
        out += residual
    return out.relu_()
