"""Turns the likelihoods of tiles, which come in batches, into scores of whole images."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from ..backend import Backend
from ..data.image_tiles import ImageTiles
from ..inference.blended_maps import BlendedMaps
from ..scoring import Scores


class TileBlender:
    """Blends the log-likelihoods of ``tiles`` image by image; the tiles of an image come in order, and together."""

    def __init__(self, tiles: ImageTiles, backend: Backend) -> None:
        self._tiles = tiles
        self._backend: Backend = backend
        self._maps: BlendedMaps | None = None

    def add(self, numbers: Sequence[int], levels: Sequence[Tensor]) -> Iterator[tuple[int, Scores]]:
        """Adds the log-likelihoods (B, H_l, W_l) per level of the tiles of ``numbers``.

        Yields the number and the scores, a batch of one, of each image that is complete.
        """
        for row, number in enumerate(numbers):
            image, _ = self._tiles.find(number)
            self._maps = self._maps or BlendedMaps(self._tiles.tiling, self._tiles.sizes[image])
            self._maps.add([level[row] for level in levels])
            if self._maps.is_complete:
                yield image, self._maps.scores(backend=self._backend)
                self._maps = None
