"""The fixed grid of tiles of some images."""

from collections.abc import Sequence

import numpy as np

from ..tiling import Place, Size, Tiling
from .image_views import GivenImage, name_of, size_of


class ImageTiles:
    """Numbers the tiles of ``images``, image by image and row by row; of files the headers are read alone.

    Raises: InputError, which names the image, if it cannot be read or cut.
    """

    def __init__(self, images: Sequence[GivenImage], tiling: Tiling) -> None:
        self.tiling = tiling
        self.sizes: list[Size] = []
        """(height, width) of each image, before it is scaled."""
        # Images of one size share their places.
        by_size: dict[Size, list[Place]] = {}
        for number, image in enumerate(images):
            size = size_of(image)
            if size not in by_size:
                by_size[size] = tiling.places(size, name_of(image, number))
            self.sizes.append(size)
        self._places = [by_size[size] for size in self.sizes]
        self._starts = np.cumsum([0, *map(len, self._places)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def of(self, image: int) -> range:
        """Returns the numbers of an image's tiles."""
        return range(int(self._starts[image]), int(self._starts[image + 1]))

    def find(self, number: int) -> tuple[int, int]:
        """Returns the number of a tile's image, and of the tile in this image."""
        image = int(np.searchsorted(self._starts, number, side="right")) - 1
        return image, number - int(self._starts[image])

    def place(self, image: int, tile: int) -> Place:
        """Returns the place of a tile of an image."""
        return self._places[image][tile]

    def moved(self, image: int, tile: int, by: Place) -> Place:
        """Returns the place of a tile of an image that is moved by (down, right) pixels, inside the image."""
        most = (max(0, side - self.tiling.tile) for side in self.tiling.scaled_size(self.sizes[image]))
        top, left = (
            min(max(0, start + step), end) for start, step, end in zip(self.place(image, tile), by, most, strict=True)
        )
        return top, left
