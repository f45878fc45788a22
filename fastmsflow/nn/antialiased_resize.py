"""A resize with antialiasing in plain PyTorch, for exported graphs."""

# pyright knows none of torchvision's names where that is not installed; anomalib brings it.
# pyright: reportMissingImports=false

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import Compose, Resize


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp_min(0)


def _cubic(x: Tensor) -> Tensor:
    """Returns the cubic filter. Source: Keys 1981, with a = -0.5 as Pillow and PyTorch have it where they antialias."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


# torchvision takes a mode, its name and Pillow's number.
FILTERS: dict[str | int, Callable[[Tensor], Tensor]] = {
    "bilinear": _triangle,
    2: _triangle,
    "bicubic": _cubic,
    3: _cubic,
}


def _mode(resize: Resize) -> str | int:
    return getattr(resize.interpolation, "value", resize.interpolation)


class AntialiasedResize(nn.Module):
    """Resizes images (B, C, H, W) as ``resize`` with antialiasing does, by two matrix products.

    ONNX Runtime has an operation for it, but OpenVINO reads the same operation as one without antialiasing.
    """

    def __init__(self, resize: Resize) -> None:
        super().__init__()
        self.size = tuple(resize.size)
        self.filter = FILTERS[_mode(resize)]

    def forward(self, images: Tensor) -> Tensor:
        """Returns the resized images."""
        given = images.shape[-2:]
        # A single number is the length of the shorter side.
        height, width = self.size if len(self.size) == 2 else [int(self.size[0] * side / min(given)) for side in given]
        rows, columns = self._weights(images, -2, height), self._weights(images, -1, width)
        return rows @ images @ columns.T

    def _weights(self, images: Tensor, side: int, length: int) -> Tensor:
        """Returns the share (length, L) of each of the L pixels of ``side`` in each of the new pixels."""
        old, new = _odd_numbers(images, images.shape[side]), _odd_numbers(images, length)
        # A size taken as a number would bind a graph to it. Whole numbers stay exact where a runtime takes bfloat16.
        given = (old[-1] + 1) // 2
        distance = old * length - new[:, None] * given
        weights = self.filter(distance.float() / (2 * given.clamp_min(length)).float())
        return (weights / weights.sum(dim=1, keepdim=True)).to(images.dtype)


def _odd_numbers(images: Tensor, count: int) -> Tensor:
    """Returns 1, 3, 5 and so on: twice the centers of pixels. In a graph the size of an arange would not be known."""
    return 2 * torch.ones(count, dtype=torch.int64, device=images.device).cumsum(0) - 1


def antialiased(transform: Any, otherwise: Callable[[Any], Any]) -> Any:
    """Returns ``transform`` with every antialiased resize in the form that can be exported.

    ``otherwise`` makes the exported form of all other transforms. A resize with ``max_size`` is one of these.
    """
    if isinstance(transform, Compose):
        return Compose([antialiased(part, otherwise) for part in transform.transforms])
    if not isinstance(transform, Resize) or not transform.antialias or _mode(transform) not in FILTERS:
        return otherwise(transform)
    return otherwise(transform) if transform.max_size else AntialiasedResize(transform)
