"""Geometry of overlapping tiles: where an image is cut, and how maps of its tiles are blended into one.

Sizes are (height, width), and places (top, left), in pixels of the image times ``Tiling.scale``.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .errors import InputError
from .number_range import OVERLAP, SCALE, SIDE, TOP_SHARES

Position = Literal["tile", "image"]
TOP_SHARE = 0.03
"""The published share of the pixels that an image's scores average."""
POSITIONS: tuple[Position, ...] = get_args(Position)
MOST_TILES = 2**16
"""The largest number of tiles of an image. Their likelihood maps, a few KiB each, are in memory together."""
MOST_PIXELS = 2**28
"""The largest number of pixels of an image times its scale."""
SMALLEST = 32
"""The fewest pixels on a side that a scale may leave."""

Size = tuple[int, int]
"""(height, width) in pixels."""
Place = tuple[int, int]
"""(top, left) of a tile in pixels of the scaled image."""


@dataclass(frozen=True)
class Tiling:
    """Cuts images into overlapping square tiles.

    Raises: InputError if a number is out of its range or ``position`` is not known.
    """

    tile: int
    """The side of a tile in pixels."""
    overlap: float = 0.25
    """The share of a tile's side that two neighbors have in common. The last tiles of a row and of a column are flush
    with the image's border and may have more."""
    scale: float = 1.0
    """The factor of an image's sides before it is cut."""
    position: Position = "tile"
    """The origin of the positional encoding: "tile", each tile's own corner, for textures; or "image", the corner of
    the image, for parts that lie in the same place in all images."""
    top_share: float = TOP_SHARE
    """The share of an image's pixels, the least likely ones, that its scores average. 3 percent of a large image are
    many times the pixels of a small defect, which a smaller share does not dilute."""

    def __post_init__(self) -> None:
        SIDE.check("tile", self.tile)
        OVERLAP.check("overlap", self.overlap)
        SCALE.check("scale", self.scale)
        TOP_SHARES.check("top_share", self.top_share)
        if self.position not in POSITIONS:
            raise InputError(f"position {self.position!r} is not known; choose one of {', '.join(POSITIONS)}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None) -> "Tiling | None":
        """Reads what ``config`` returns; None for a model that takes whole images."""
        return None if config is None else cls(**{field.name: config[field.name] for field in fields(cls)})

    @property
    def config(self) -> dict[str, Any]:
        """The values, fit for JSON, from which ``from_config`` makes this tiling again."""
        return asdict(self)

    def __str__(self) -> str:
        scale = "" if self.scale == 1 else f" at {self.scale:g} times their size"
        share = "" if self.top_share == TOP_SHARE else f", scored by {self.top_share:g} of their pixels"
        return f"images{scale} in tiles of {self.tile}x{self.tile}, overlapping by {self.overlap:g}{share}"

    def scaled_size(self, size: Size, name: str = "the image") -> Size:
        """Returns the size of an image of ``size`` times the scale. ``name``: the image's name in errors.

        Raises: InputError if it has less than SMALLEST pixels on a side, or more than MOST_PIXELS.
        """
        height, width = (max(1, round(side * self.scale)) for side in size)
        fact = f"{name}: {size[1]}x{size[0]} pixels, times a scale of {self.scale:g}, are {width}x{height}"
        if min(height, width) < SMALLEST:
            raise InputError(f"{fact}, less than {SMALLEST} on a side; give a larger scale")
        if height * width > MOST_PIXELS:
            raise InputError(f"{fact}, more than {MOST_PIXELS / 1e6:.0f} megapixels; give a smaller scale")
        return height, width

    def places(self, size: Size, name: str = "the image") -> list[Place]:
        """Returns the places of the tiles of an image of ``size``, row by row. ``name``: the image's name in errors.

        Raises: InputError if ``scaled_size`` does, or there are more than MOST_TILES.
        """
        height, width = self.scaled_size(size, name)
        # Counted first: an overlap next to 1 has more tiles than a list could hold.
        count = math.prod(1 + math.ceil(max(0, side - self.tile) / self._step) for side in (height, width))
        if count > MOST_TILES:
            raise InputError(
                f"{name}: {count} tiles of {self.tile}x{self.tile} with an overlap of {self.overlap:g}, more than"
                f" {MOST_TILES}; give larger tiles, a smaller overlap or a smaller scale"
            )
        return [(top, left) for top in self._starts(height) for left in self._starts(width)]

    def offset(self, place: Place) -> tuple[float, float]:
        """Returns the place of a tile in heights and widths of a tile, as the flow takes it; (0, 0) if ``position`` is
        "tile"."""
        return (0.0, 0.0) if self.position == "tile" else (place[0] / self.tile, place[1] / self.tile)

    def offsets(self, places: list[Place], device: torch.device | None = None) -> Tensor | None:
        """Returns ``offset`` of each place, (B, 2) float64; None if ``position`` is "tile"."""
        if self.position == "tile":
            return None
        return torch.tensor(places, dtype=torch.float64, device=device) / self.tile

    def weights(self, length: int, device: torch.device | None = None) -> list[tuple[int, Tensor]]:
        """Returns start and weights (tile,) of the tiles along a side of ``length`` pixels of the scaled image.

        The weights of all tiles that cover a pixel sum to 1, and rise from the border of a tile over its overlap as a
        squared sine does, so that no seam shows. A tile's weight in the image is the product of those of its two sides.
        """
        starts = self._starts(length)
        end = max(length, self.tile)
        ramp = max([a + self.tile - b for a, b in pairwise(starts)], default=0)
        near = (torch.arange(self.tile, dtype=torch.float64) + 0.5).clamp(max=ramp or 1) / (ramp or 1)
        window = ((near * math.pi / 2).sin() * (near.flip(0) * math.pi / 2).sin()).square()
        total = torch.zeros(end, dtype=torch.float64)
        for start in starts:
            total[start : start + self.tile] += window
        shares = [(start, window / total[start : start + self.tile]) for start in starts]
        return [(start, share.to(device, torch.float32)) for start, share in shares]

    @property
    def _step(self) -> int:
        return max(1, round(self.tile * (1 - self.overlap)))

    def _starts(self, length: int) -> list[int]:
        """Returns the starts of the tiles along a side of ``length`` pixels, the last one flush with its end."""
        last = max(0, length - self.tile)
        return [*range(0, last, self._step), last]


def cut_tile(image: Tensor, place: Place, tile: int) -> Tensor:
    """Returns the tile (C, ``tile``, ``tile``) at ``place`` of an image (C, H, W) of any dtype.

    Beyond the image's lower and right border it is continued by reflection.
    """
    for side, start in zip((1, 2), place, strict=True):
        length = image.shape[side]
        if start + tile <= length:
            image = image.narrow(side, start, tile)
        else:
            image = image.index_select(side, reflected(start, tile, length).to(image.device))
    return image


def reflected(start: int, count: int, length: int) -> Tensor:
    """Returns the indices (count,) int64 of ``count`` pixels from ``start`` on, in a side of ``length`` pixels.

    Beyond its end the side is continued by reflection, as often as it takes; the last pixel is not repeated.
    """
    period = max(1, 2 * (length - 1))
    index = torch.arange(start, start + count) % period
    return torch.minimum(index, period - index) if length > 1 else torch.zeros_like(index)
