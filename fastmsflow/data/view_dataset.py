"""Datasets of views: whole images or their tiles, each in some variants of light and place."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from ..tiling import Place
from .datasets import ImageFileDataset
from .image_tiles import ImageTiles
from .image_views import GivenImage, ImageView, name_of
from .lazy_sequence import LazySequence
from .light import draw_light

# Tells the draws of places from those of light.
PLACES = 1


@dataclass(frozen=True, kw_only=True)
class Variation:
    """The way in which the views of an image, or of a tile of it, differ."""

    seed: int
    light: bool = False
    """True if each view has a light of its own."""
    jitter: int = 0
    """The number of pixels by which a tile is moved at most, in each direction."""
    variants: int = 1
    """The number of views of each image or tile; the first one is unchanged. 1 if ``epoch`` is given."""
    epoch: int | None = None
    """The epoch for which views are drawn anew; None: they are the same in all epochs."""

    def key(self, image: int, tile: int, variant: int) -> tuple[int, ...] | None:
        """Returns the numbers from which a view is drawn; None for a view that is not changed."""
        if self.epoch is not None:
            return (self.seed, self.epoch, image, tile)
        return (self.seed, image, tile, variant) if variant else None


UNCHANGED = Variation(seed=0)


class ViewDataset(ImageFileDataset):
    """Reads views of ``images``, files or arrays, at ``image_size`` (H, W).

    ``tiles``: the images' tiles, each of which is an item; None: whole images are. ``variation``: the variants of each
    item, which follow each other.
    """

    def __init__(
        self,
        images: Sequence[GivenImage],
        image_size: tuple[int, int],
        tiles: ImageTiles | None = None,
        variation: Variation = UNCHANGED,
    ) -> None:
        self._given = images
        self._variation = variation
        self.variants = variation.variants
        self.tiles = tiles
        count = len(images) if tiles is None else len(tiles)
        super().__init__(LazySequence(count * self.variants, self._view), image_size)

    @property
    def image_count(self) -> int:
        return len(self._given)

    def items_of(self, image: int) -> range:
        items = range(image, image + 1) if self.tiles is None else self.tiles.of(image)
        return range(items.start * self.variants, items.stop * self.variants)

    def offsets(self, numbers: Sequence[int]) -> Tensor | None:
        if self.tiles is None or self.tiles.tiling.position == "tile":
            return None
        return self.tiles.tiling.offsets([self._place(self.tiles, *self._find(number)) for number in numbers])

    def in_epoch(self, epoch: int) -> "ViewDataset":
        if self._variation.epoch is None:
            return self
        return ViewDataset(self._given, self.image_size, self.tiles, replace(self._variation, epoch=epoch))

    def name(self, index: int) -> str:
        image, _, _ = self._find(index)
        return name_of(self._given[image], image)

    def view_name(self, index: int) -> str:
        if self.tiles is None:
            return self.name(index)
        image, tile, variant = self._find(index)
        if self._variation.epoch is not None and self._variation.jitter:
            # Callers do not say of which epoch they speak.
            top, left = self.tiles.place(image, tile)
            return f"{self.name(index)} (tile near {left}, {top})"
        top, left = self._place(self.tiles, image, tile, variant)
        return f"{self.name(index)} (tile at {left}, {top})"

    def _find(self, index: int) -> tuple[int, int, int]:
        """Returns the number of an item's image, of its tile in the image, and of its variant."""
        item, variant = divmod(index, self.variants)
        image, tile = (item, 0) if self.tiles is None else self.tiles.find(item)
        return image, tile, variant

    def _view(self, index: int) -> GivenImage | ImageView:
        image, tile, variant = self._find(index)
        key = self._variation.key(image, tile, variant)
        light = draw_light(*key) if self._variation.light and key is not None else None
        if self.tiles is None:
            # An image that is not changed has the fingerprint of its file.
            return self._given[image] if light is None else ImageView(self._given[image], light=light)
        return ImageView(self._given[image], self.tiles.tiling, self._place(self.tiles, image, tile, variant), light)

    def _place(self, tiles: ImageTiles, image: int, tile: int, variant: int) -> Place:
        key, jitter = self._variation.key(image, tile, variant), self._variation.jitter
        if not jitter or key is None:
            return tiles.place(image, tile)
        down, right = np.random.default_rng((PLACES, *key)).integers(-jitter, jitter, 2, endpoint=True).tolist()
        return tiles.moved(image, tile, (down, right))
