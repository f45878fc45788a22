"""Scores images of any size by overlapping tiles, so that small defects of large images are seen at full size."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import Backend
from ..data.image_views import ScaledImage, as_floats, scaled_image
from ..errors import InputError
from ..models.image_checks import check_form, check_values
from ..models.msflow import MSFlow, Prediction
from ..number_range import COUNT
from ..scoring import Scores
from ..tiling import Place, Tiling, cut_tile
from .blended_maps import BlendedMaps
from .tiled_models import tiled_model

BATCH_SIZE = 8
"""Tiles that go through a model at once where nobody asks for another number."""
Stopwatch = Callable[[str], AbstractContextManager[object]]
"""Measures a stage, by its name, in a with block."""


class TileModel(Protocol):
    """A model that computes tiles."""

    @property
    def device(self) -> torch.device:
        """The device that tiles and offsets are to be on."""
        ...

    def features(self, images: Tensor) -> list[Tensor]:
        """See ``MSFlow.features``."""
        ...

    def log_likelihoods(self, features: Sequence[Tensor], offsets: Tensor | None) -> list[Tensor]:
        """See ``MSFlow.log_likelihoods``."""
        ...


def untimed(stage: str) -> AbstractContextManager[object]:
    """Measures nothing."""
    return nullcontext()


class TiledPredictor:
    """Scores images of any size by overlapping tiles.

    ``model``: computes tiles on its device, as ``model.predict`` computes images; ``model.for_inference()`` is faster.
    ``tile``: side of a tile in pixels; if it is not the side of the model's images, a copy of the model computes the
    tiles. ``overlap``: share of a tile's side that neighbors have in common. ``scale``: factor of an image's sides
    before it is cut. ``batch_size``: tiles that go through the model at once. The positional encoding has its origin
    where ``model.tiling`` says, by default in each tile's own corner. ``top_share``: share of an image's pixels, the
    least likely ones, that its scores average; None: ``model.tiling``'s or, if it has none, the published 0.03. It
    should not be much more than the share of the smallest defect.

    The log-likelihoods of tiles are blended, see fastmsflow.inference.blended_maps, and the image is scored by the
    blended map. Memory: one batch of tiles, a few KiB for each tile of an image, and the image's maps.

    Raises: InputError if an argument is out of its range, or the backbone takes no tiles of this size.
    """

    def __init__(
        self,
        model: MSFlow,
        tile: int,
        overlap: float = 0.25,
        scale: float = 1.0,
        *,
        top_share: float | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        COUNT.check("batch_size", batch_size)
        own = model.tiling or Tiling(tile)
        share = own.top_share if top_share is None else top_share
        self.tiling = Tiling(tile, overlap, scale, own.position, share)
        self.model = tiled_model(model, self.tiling)
        self.batch_size = batch_size

    def predict(self, images: Tensor, top_k: float | None = None) -> Prediction:
        """Computes scores and maps of images (B, 3, H, W) in [0, 1] of any size; the maps are (B, H, W).

        An image of the size of one tile has exactly the result of ``model.predict``. ``top_k``: share of the pixels
        that an image's scores average; None: ``top_share``.

        Raises: InputError if images are not a floating tensor of this shape, are none, are far out of [0, 1], too small
        for the scale or too large for the tiles, or if ``top_k`` is not in [0, 1].
        """
        check_form(images)
        check_values(images, may_be_nan=False)
        results = [
            Prediction(s.score, s.log_score, s.score_map_add, s.score_map_mul, s.absolute_score)
            for s in self.scores(images, top_k)
        ]
        return Prediction(*(torch.cat(parts) for parts in zip(*results, strict=True)))

    def scores(self, images: Iterable[Tensor], top_k: float | None = None) -> Iterator[Scores]:
        """Yields scores and maps of each image, a batch of one, in order; the images' tiles share batches.

        ``images``: (3, H, W), floating in [0, 1] or uint8, each of its own size. ``top_k``: see ``predict``.
        Raises: InputError if ``predict`` does.
        """
        given = (self._scaled(image, f"image {number}") for number, image in enumerate(images))
        for (scores,) in blended_scores(
            given,
            self.tiling,
            [self.model],
            batch_size=self.batch_size,
            top_k=top_k,
            backend=self.model.flow.backend,
        ):
            yield scores

    def _scaled(self, image: Tensor, name: str) -> ScaledImage:
        """Scales an image. Raises: InputError if it is not as ``scores`` takes it, or cannot be scaled."""
        if not isinstance(image, Tensor) or image.ndim != 3 or len(image) != 3:
            what = f"has shape {tuple(image.shape)}" if isinstance(image, Tensor) else f"is a {type(image).__name__}"
            raise InputError(f"{name} {what}; give a tensor (3, H, W), floating in [0, 1] or uint8")
        if not (image.is_floating_point() or image.dtype == torch.uint8):
            raise InputError(f"{name} has dtype {image.dtype}; give floating pixels in [0, 1], or uint8")
        return scaled_image(image, self.tiling, name)


def blended_scores(
    images: Iterable[ScaledImage],
    tiling: Tiling,
    models: Sequence[TileModel],
    *,
    batch_size: int = BATCH_SIZE,
    top_k: float | None = None,
    backend: Backend = "auto",
    stopwatch: Stopwatch = untimed,
) -> Iterator[list[Scores]]:
    """Yields the scores of each image, a batch of one, by each of ``models``, in order; images' tiles share batches.

    The models differ in their flows only, so the extractor runs once. ``backend``: computes the scores of the blended
    maps, see fastmsflow.backend. ``stopwatch`` measures the stages load, extractor
    and flow, blending included.
    """
    device = models[0].device
    waiting: deque[list[BlendedMaps]] = deque()
    batch: list[_Tile] = []

    @torch.no_grad()
    def compute() -> None:
        with stopwatch("load"):
            pixels = torch.stack([tile.pixels for tile in batch])
            places = [tile.place for tile in batch]
            if device.type == "cuda":
                # A CUDA graph is of one batch size, and a condition of one image would be taken for one of all.
                missing = max(2, batch_size) - len(batch)
                pixels, places = F.pad(pixels, (0,) * 7 + (missing,)), places + [(0, 0)] * missing
            pixels = pixels.to(device)
            offsets = tiling.offsets(places, device)
        with stopwatch("extractor"):
            features = models[0].features(pixels)
        with stopwatch("flow"):
            for number, model in enumerate(models):
                levels = model.log_likelihoods(features, offsets)
                for row, tile in enumerate(batch):
                    tile.maps[number].add([level[row] for level in levels])
        batch.clear()

    def complete() -> Iterator[list[Scores]]:
        while waiting and waiting[0][-1].is_complete:
            maps = waiting.popleft()
            with stopwatch("flow"), torch.no_grad():
                scores = [of_model.scores(top_k, backend) for of_model in maps]
            yield scores

    for image in images:
        maps = [BlendedMaps(tiling, image.size, image.name) for _ in models]
        waiting.append(maps)
        for place in maps[0].places:
            pixels = cut_tile(image.pixels, place, tiling.tile)
            batch.append(_Tile(maps, place, as_floats(pixels) if pixels.dtype == torch.uint8 else pixels))
            if len(batch) == batch_size:
                compute()
        yield from complete()
    if batch:
        compute()
    yield from complete()


class _Tile(NamedTuple):
    maps: list[BlendedMaps]
    """The maps of the tile's image by each model."""
    place: Place
    pixels: Tensor
