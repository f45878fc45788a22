"""Scores batches: the scores, label and regions of each image, the same for every kind of results."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..calibration import DecisionThreshold
from ..data.image_batches import BatchReader, ReadBatch, ReadImage, Shrink
from ..data.image_views import ScaledImage
from ..files import shown
from ..models.msflow import MSFlow
from ..scoring import MapKind, Scores
from .engines import TORCH, ready_model
from .precision import AUTO
from .regions import Region, find_regions
from .tiled_predictor import BATCH_SIZE

LABELS = {True: "defective", False: "good", None: None}
NOT_FINITE = (
    "its score is not finite; if it was scored in float16 try --dtype float32, else look for where the model overflows"
)


class ImageResult(NamedTuple):
    """The result of one image."""

    score: float
    log_score: float
    absolute_score: float
    defective: bool | None
    """None without a threshold."""
    regions: list[Region] | None
    """None without a threshold of regions."""
    score_map: np.ndarray
    """(H, W) float32, the map that pictures show."""


class Scorer:
    """Scores batches with the copy of ``model`` that fastmsflow.inference.prepare makes, or by OpenVINO.

    ``decision``: labels images, None for no labels; ``region_threshold``: regions lie where the absolute map is above
    it, None for no regions; ``dtype``: see ``resolve_dtype``; ``kind``: the map that results have; ``engine``: torch or
    openvino, see fastmsflow.inference.openvino_engine.OpenVinoModel; ``tiles``: number of tiles that are computed at
    once, if the model has a tiling.

    Raises: InputError if ``dtype`` or ``engine`` is not known; UnavailableError if the engine is not installed.
    """

    def __init__(
        self,
        model: MSFlow,
        *,
        decision: DecisionThreshold | None = None,
        region_threshold: float | None = None,
        dtype: str = AUTO,
        kind: MapKind = "absolute",
        engine: str = TORCH,
        tiles: int = BATCH_SIZE,
    ) -> None:
        self.decision = decision
        self.region_threshold = region_threshold
        self.kind: MapKind = kind
        self.model = model
        self.engine = engine
        self._ready = ready_model(model, dtype, engine, tiles)

    @property
    def dtype(self) -> str:
        """The name of the dtype of the flow."""
        return self._ready.dtype

    def reader(self, shrink: Shrink | None = None) -> BatchReader:
        """Returns what reads images for ``items``; ``shrink``: see BatchReader."""
        return BatchReader(self.model.image_size, shrink, self.model.tiling)

    def items(self, batches: Iterable[ReadBatch]) -> Iterator[tuple[ReadImage, ImageResult | None, str | None]]:
        """Yields each image with its result, or with None and a line with the reason, in order."""
        results = self._whole(batches) if self.model.tiling is None else self._in_tiles(batches)
        for item, result in results:
            yield item, result, item.fault or (None if result else f"{shown(item.name or '')}: {NOT_FINITE}")

    def _whole(self, batches: Iterable[ReadBatch]) -> Iterator[tuple[ReadImage, ImageResult | None]]:
        for read in batches:
            sizes = [item.size for item in read.items if item.size is not None]
            results = iter([] if read.pixels is None else self(read.pixels, sizes))
            for item in read.items:
                yield item, None if item.fault else next(results)

    def _in_tiles(self, batches: Iterable[ReadBatch]) -> Iterator[tuple[ReadImage, ImageResult | None]]:
        waiting: deque[ReadImage] = deque()

        def to_cut() -> Iterator[ScaledImage]:
            for read in batches:
                images = iter(read.to_cut)
                for item in read.items:
                    waiting.append(item)
                    if not item.fault:
                        yield next(images)

        for result in self.in_tiles(to_cut()):
            while waiting[0].fault:
                yield waiting.popleft(), None
            yield waiting.popleft(), result
        for item in waiting:
            yield item, None

    def in_tiles(self, images: Iterable[ScaledImage]) -> Iterator[ImageResult | None]:
        """Yields the result of each image in tiles, None where its score is not finite."""
        sizes: deque[tuple[int, int]] = deque()

        def counted() -> Iterator[ScaledImage]:
            for image in images:
                sizes.append((image.size[1], image.size[0]))
                yield image

        for scores in self._ready.blended(counted()):
            yield from self._results(scores, [sizes.popleft()])

    @torch.no_grad()
    def __call__(self, pixels: Tensor, sizes: Sequence[tuple[int, int]]) -> list[ImageResult | None]:
        """Returns the result of each image, None where its score is not finite.

        ``pixels``: (B, 3, H, W) in [0, 1]; ``sizes``: the (width, height) of each image before it was resized.
        """
        return self._results(self._ready.scores(pixels), sizes)

    def _results(self, scores: Scores, sizes: Sequence[tuple[int, int]]) -> list[ImageResult | None]:
        maps = scores.score_map(self.kind).float().cpu().numpy()
        # Regions are found on the absolute map, whichever map is shown.
        absolute_maps = maps
        if self.region_threshold is not None and self.kind != "absolute":
            absolute_maps = scores.absolute_map.float().cpu().numpy()
        values = torch.stack([scores.score, scores.log_score, scores.absolute_score], dim=1).double().tolist()
        return [self._result(*image) for image in zip(values, maps, absolute_maps, sizes, strict=True)]

    def _result(
        self, values: list[float], score_map: np.ndarray, absolute_map: np.ndarray, size: tuple[int, int]
    ) -> ImageResult | None:
        if not np.isfinite(values).all():
            return None
        score, log_score, absolute = values
        defective = None if self.decision is None else absolute > self.decision.value
        regions = None if self.region_threshold is None else find_regions(absolute_map, self.region_threshold, size)
        return ImageResult(score, log_score, absolute, defective, regions, score_map)
