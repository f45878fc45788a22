"""A resize with antialiasing in plain PyTorch, for exported graphs."""

# Without torchvision, which anomalib brings, pyright knows none of its names.
# pyright: reportMissingImports=false

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import Compose, InterpolationMode, Resize


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp_min(0)


def _cubic(x: Tensor) -> Tensor:
    """Source: Keys 1981, with a = -0.5 as Pillow and PyTorch have it where they antialias."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


FILTERS: dict[InterpolationMode, Callable[[Tensor], Tensor]] = {
    InterpolationMode.BILINEAR: _triangle,
    InterpolationMode.BICUBIC: _cubic,
}


class AntialiasedResize(nn.Module):
    """Resizes images (B, C, H, W) as ``resize`` with antialiasing does, by two matrix products.

    ONNX Runtime has an operation for it, but OpenVINO reads the same operation as one without antialiasing.
    """

    def __init__(self, resize: Resize) -> None:
        super().__init__()
        self.size = tuple(resize.size)
        self.interpolation = resize.interpolation

    def forward(self, images: Tensor) -> Tensor:
        """Returns the resized images."""
        given = images.shape[-2:]
        # A single number is the length of the shorter side.
        height, width = self.size if len(self.size) == 2 else [side * self.size[0] // min(given) for side in given]
        rows, columns = self._weights(images, -2, height), self._weights(images, -1, width)
        return rows @ images @ columns.T

    def _weights(self, images: Tensor, side: int, length: int) -> Tensor:
        """Returns the share (length, L) of each of the L pixels of ``side`` in each of the new pixels."""
        # A size taken as a number would bind a graph to it. Whole numbers stay exact where a runtime takes bfloat16.
        odd = 2 * torch.arange(images.shape[side], device=images.device) + 1
        given = (odd[-1] + 1) // 2
        distance = odd * length - (2 * torch.arange(length, device=images.device)[:, None] + 1) * given
        weights = FILTERS[self.interpolation](distance.float() / (2 * given.clamp_min(length)).float())
        return (weights / weights.sum(dim=1, keepdim=True)).to(images.dtype)


def antialiased(transform: nn.Module, otherwise: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Returns ``transform`` with every antialiased resize in the form that can be exported.

    ``otherwise`` makes the exported form of all other transforms. A resize with ``max_size`` is one of these.
    """
    if isinstance(transform, Compose):
        return Compose([antialiased(part, otherwise) for part in transform.transforms])
    if not isinstance(transform, Resize) or not transform.antialias or transform.interpolation not in FILTERS:
        return otherwise(transform)
    return otherwise(transform) if transform.max_size else AntialiasedResize(transform)
