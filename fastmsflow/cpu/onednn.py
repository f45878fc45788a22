"""oneDNN's convolutions with weights packed once, as torch.compile uses them, with what follows in the same pass."""

import platform
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.convolution_relu import Geometry


def is_available() -> bool:
    """Tells whether PyTorch has oneDNN, with these operators, on an x86-64 CPU; on others nothing was measured."""
    return (
        torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and platform.machine() in ("x86_64", "AMD64")
    )


class Packed(NamedTuple):
    """A convolution whose weight is packed for inputs of one shape; other shapes are computed too, slowly."""

    weight: Tensor
    """The weight in a layout that oneDNN chose."""
    bias: Tensor | None
    geometry: Geometry

    def __call__(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """Computes convolution(x) + residual and, if ``relu``, relu of it."""
        after = "relu" if relu else None
        stride, padding, dilation, groups = self.geometry
        window = padding, stride, dilation, groups
        if residual is None:
            return _operators()._convolution_pointwise(x, self.weight, self.bias, *window, after or "none", [], "")
        layout = torch.channels_last
        x, residual = x.contiguous(memory_format=layout), residual.contiguous(memory_format=layout)
        binary = _operators()._convolution_pointwise.binary
        return binary(x, residual, self.weight, self.bias, *window, "add", 1.0, after, [], "")


def pack(weight: Tensor, bias: Tensor | None, geometry: Geometry, shape: tuple[int, ...]) -> Packed:
    """Packs weight (O, I / groups, h, w) for inputs of ``shape`` (B, I, H, W), of the weight's dtype."""
    stride, padding, dilation, groups = geometry
    packed = _operators()._reorder_convolution_weight(weight, padding, stride, dilation, groups, list(shape))
    return Packed(packed, None if bias is None else bias.to(weight.dtype), geometry)


def _operators() -> Any:
    return torch.ops.mkldnn
