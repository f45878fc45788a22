"""What a model says of a batch: scores, labels and regions, the same for every kind of result."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..calibration import Calibration, Threshold
from ..data.image_batches import ReadBatch, ReadImage
from ..errors import InputError
from ..files import shown
from ..models.msflow import MSFlow
from ..scoring import MapKind
from .precision import AUTO, prepare
from .regions import Region, find_regions

LABELS = {True: "defective", False: "good", None: None}
NOT_FINITE = (
    "its score is not finite; if it was scored in float16 try --dtype float32, else look for where the model overflows"
)


@dataclass(frozen=True)
class DecisionThreshold:
    """What an absolute score above ``value`` is called defective by."""

    value: float
    text: str

    @classmethod
    def from_calibration(
        cls, calibration: Calibration | None, false_alarms: float | None, value: float | None
    ) -> "DecisionThreshold | None":
        """``value``, nats, if given; else the calibrated threshold for ``false_alarms`` (None: as calibrated); None
        where there is none. Errors: InputError where one was asked for that cannot be had."""
        if value is not None:
            if not math.isfinite(value):
                raise InputError(f"the threshold is {value}; give a number of nats")
            return cls(value, f"{value:.4g} nats, as given")
        if calibration is None:
            return None
        try:
            found: Threshold = calibration.threshold(false_alarms)
        except InputError:
            if false_alarms is not None:
                raise
            return None
        return cls(found.value, str(found))


def region_threshold(calibration: Calibration | None, false_alarms: float | None) -> float | None:
    """The value of the absolute map, in nats, above which a region begins; ``false_alarms``: share of good images that
    may show one, None for the calibrated one. None where there is none.

    Errors: InputError where ``false_alarms`` is given and cannot be had.
    """
    if calibration is None:
        if false_alarms is not None:
            raise InputError("this model is not calibrated: `fastmsflow calibrate MODEL GOOD_IMAGES` first")
        return None
    try:
        return calibration.region_threshold(false_alarms).value
    except InputError:
        if false_alarms is not None:
            raise
        return None


class ImageResult(NamedTuple):
    """One image."""

    score: float
    log_score: float
    absolute_score: float
    defective: bool | None
    """None without a limit."""
    regions: list[Region] | None
    """None where the model has no threshold of regions."""
    score_map: np.ndarray
    """(H, W) float32, the map that is shown."""


class Scorer:
    """Scores batches with the copy of a model that fastmsflow.inference.prepare makes; ``model`` is the original.

    ``limit``: labels are by it; ``region_threshold``: regions are where the absolute map is above it, None for no
    regions; ``dtype``: see ``resolve_dtype``; ``kind``: the map that results carry.
    Errors: InputError where ``dtype`` is not known.
    """

    def __init__(
        self,
        model: MSFlow,
        *,
        limit: DecisionThreshold | None = None,
        region_threshold: float | None = None,
        dtype: str = AUTO,
        kind: MapKind = "absolute",
    ) -> None:
        self.limit = limit
        self.region_threshold = region_threshold
        self.kind: MapKind = kind
        self.model = model
        self._ready = prepare(model, dtype)

    @property
    def dtype(self) -> str:
        """The name of the dtype that it computes in."""
        return str(self._ready.flow.dtype).removeprefix("torch.")

    def items(self, read: ReadBatch) -> Iterator[tuple[ReadImage, ImageResult | None, str | None]]:
        """Yields each image of a batch with its result, or with None and the line that says why there is none."""
        sizes = [item.size for item in read.items if item.size is not None]
        judged = iter([] if read.pixels is None else self(read.pixels, sizes))
        for item in read.items:
            one = None if item.fault else next(judged)
            yield item, one, item.fault or (None if one else f"{shown(item.name or '')}: {NOT_FINITE}")

    @torch.no_grad()
    def __call__(self, pixels: Tensor, sizes: Sequence[tuple[int, int]]) -> list[ImageResult | None]:
        """``pixels``: (B, 3, H, W) in [0, 1] of images of ``sizes``, (width, height) each. None for an image whose
        score is not finite."""
        device = next(self._ready.parameters()).device
        scores = self._ready.scores(pixels.to(device, memory_format=torch.channels_last))
        shown = _as_array(scores.score_map(self.kind))
        # Regions are of the absolute map, whichever is shown.
        of_regions = shown
        if self.region_threshold is not None and self.kind != "absolute":
            of_regions = _as_array(scores.absolute_map)
        table = torch.stack([scores.score, scores.log_score, scores.absolute_score], dim=1).double().tolist()
        return [self._judged(*one) for one in zip(table, shown, of_regions, sizes, strict=True)]

    def _judged(
        self, values: list[float], score_map: np.ndarray, of_regions: np.ndarray, size: tuple[int, int]
    ) -> ImageResult | None:
        if not np.isfinite(values).all():
            return None
        score, log_score, absolute = values
        defective = None if self.limit is None else absolute > self.limit.value
        above = self.region_threshold
        regions = None if above is None else find_regions(of_regions, above, size)
        return ImageResult(score, log_score, absolute, defective, regions, score_map)


def _as_array(score_map: Tensor) -> np.ndarray:
    return score_map.float().cpu().numpy()
