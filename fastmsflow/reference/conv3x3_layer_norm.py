"""3x3 convolution, layer normalization and ReLU: the first half of a subnet."""

from torch import Tensor

from .conv3x3 import conv3x3
from .layer_norm import layer_norm_relu


def conv3x3_layer_norm_relu(x: Tensor, weight: Tensor, norm: tuple[Tensor, Tensor], condition: Tensor) -> Tensor:
    """relu(layer_norm(conv3x3(x, weight) + condition)), (B, O, H, W).

    x (B, I, H, W); weight (O, I, 3, 3); ``norm``: the norm's weight and bias, (O,) each; ``condition`` (1, O, H, W), or
    a bias (1, O, 1, 1).
    """
    return layer_norm_relu(conv3x3(x, weight), *norm, condition)
