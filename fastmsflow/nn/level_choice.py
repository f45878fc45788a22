"""The choice of a backbone's layers, and of the grids that their features are pooled to."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..number_range import COUNT, whole

LEVELS = 3
LAYER = whole(-1000, 1000)

Three = tuple[int, int, int]


def check_layers(layers: Sequence[int]) -> Three:
    """Returns ``layers``, three numbers of layers, as a tuple; negative ones count from the end.

    Raises: InputError if they are not three whole numbers.
    """
    return _three("layers", layers, "three numbers of layers, e.g. (2, 5, 8)")


def resolve_layers(name: str, layers: Sequence[int], count: int) -> Three:
    """Returns ``layers`` as numbers from 0 on, as timm numbers the ``count`` layers of the backbone ``name``.

    Raises: InputError if they are not three layers of it in ascending order.
    """
    first, second, third = given = check_layers(layers)
    if not all(-count <= layer < count for layer in given):
        raise InputError(f"layers are {_listed(given)}; {name} has 0 to {count - 1}, or -{count} to -1 from its end")
    first, second, third = resolved = (first % count, second % count, third % count)
    if not first < second < third:
        raise InputError(f"layers are {_listed(given)}; give three different ones in ascending order")
    return resolved


def check_level_strides(strides: Sequence[int]) -> Three:
    """Returns ``strides``, those of each level's grid in cells of its layer's, as a tuple.

    Raises: InputError if they are not three whole numbers from 1 on, each at least the one before it.
    """
    first, second, third = given = _three("level_strides", strides, "three strides, e.g. (1, 2, 4)")
    for stride in given:
        COUNT.check("level_strides", stride)
    if not first <= second <= third:
        raise InputError(f"level_strides are {_listed(given)}; give them in ascending order")
    return given


def refuse_coarser_than_grid(name: str, size: tuple[int, int], reductions: Sequence[int], strides: Three) -> None:
    """Raises: InputError if a stride is larger than the grid that it pools.

    ``size``: (H, W) of images; ``reductions``: strides of the layers' grids in pixels.
    """
    for stride, reduction in zip(strides, reductions, strict=True):
        height, width = (-(-side // reduction) for side in size)
        if stride > min(height, width):
            raise InputError(
                f"level stride {stride} pools more than the grid of {height}x{width} that {name} makes of images of"
                f" {size[0]}x{size[1]}; give strides of at most {min(height, width)}, or larger images"
            )


def pool_level(level: Tensor, stride: int) -> Tensor:
    """Averages a level (B, C, H, W) to ``stride`` times fewer cells a side, rounded up: no border is left out."""
    if stride == 1:
        return level
    height, width = (math.ceil(side / stride) for side in level.shape[-2:])
    return F.adaptive_avg_pool2d(level, (height, width))


def with_even_channels(level: Tensor, images: Tensor) -> Tensor:
    """Returns a level (B, C, H, W) with the brightness of ``images`` as a channel more if C is odd: couplings take
    halves.

    A constant, or a copy of a channel, would have no density: a flow gains by scaling it as far as its clamp allows.
    """
    if level.shape[1] % 2 == 0:
        return level
    height, width = level.shape[-2:]
    brightness = F.adaptive_avg_pool2d(images.mean(dim=1, keepdim=True), (height, width))
    return torch.cat([level, brightness], dim=1)


def _three(name: str, values: Sequence[int], what: str) -> Three:
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != LEVELS:
        raise InputError(f"{name} is {values!r}; give {what}")
    for value in values:
        LAYER.check(name, value)
    return int(values[0]), int(values[1]), int(values[2])


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
