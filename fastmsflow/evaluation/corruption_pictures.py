"""Pictures of a good and a defective test image under each change of light."""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..data import ImageSet, load_mask
from ..data.image_views import ImageView, read_scaled, read_view
from ..data.light import LightChange
from ..models.msflow import MSFlow
from ..scoring import ImageScores, MapKind
from ..visualization.color_scale import ColorScale
from ..visualization.html_report import ReportRow
from ..visualization.plots import gallery
from .evaluator import TestResult
from .score_map_store import ScoreMapStore

SIDE = 384
"""The longest side of an image in the picture."""


class ChosenMaps(ScoreMapStore):
    """Stores the maps of a few images alone."""

    def __init__(self, folder: Path, chosen: Collection[int]) -> None:
        super().__init__(folder)
        self._chosen = frozenset(chosen)

    def add(self, numbers: Sequence[int], maps: np.ndarray) -> None:
        kept = [row for row, number in enumerate(numbers) if number in self._chosen]
        super().add([numbers[row] for row in kept], maps[kept])


def chosen_images(images: ImageSet, scores: ImageScores) -> list[int]:
    """Returns the numbers of the good and of the defective image whose absolute scores are the medians."""
    labels = np.array([sample.label for sample in images.test])
    ordered = np.argsort(scores.absolute_score.numpy(), kind="stable")
    by_label = [ordered[labels[ordered] == label] for label in (0, 1)]
    return [int(numbers[len(numbers) // 2]) for numbers in by_label]


def picture(
    images: ImageSet, number: int, result: TestResult, model: MSFlow, *, change: str, light: LightChange | None
) -> ReportRow:
    """Returns a test image as ``model`` was shown it, shrunk to SIDE, with its heat map and mask.

    ``result``: the result under ``light``, with the map of the image. ``change``: the name of the change.
    """
    assert result.maps is not None
    sample, score_map = images.test[number], result.maps[number]
    name, lit = str(sample.image), None if light is None else light.for_image(number)
    view = ImageView(sample.image, light=lit)
    if model.tiling is None:
        pixels = (read_view(view, name, model.image_size) * 255).round().byte()
        mask = load_mask(sample, model.image_size)
    else:
        pixels = read_scaled(view, name, model.tiling).pixels
        mask = load_mask(sample, None)
    height, width = score_map.shape
    share = min(1, SIDE / max(height, width))
    size = (max(1, round(width * share)), max(1, round(height * share)))
    image, heat_map = Image.fromarray(pixels.permute(1, 2, 0).numpy()), Image.fromarray(score_map)
    return ReportRow(
        image=sample.image,
        label=sample.label,
        kind=f"{change}: {sample.kind}",
        score=float(result.scores.absolute_score[number]),
        pixels=np.asarray(image.resize(size, Image.Resampling.BOX)),
        score_map=np.asarray(heat_map.resize(size, Image.Resampling.BOX)),
        mask=None if sample.mask is None else np.asarray(Image.fromarray(mask.numpy()).resize(size)),
    )


def write_pictures(path: Path, pictures: Sequence[ReportRow], model: MSFlow, map_kind: MapKind | None = None) -> None:
    """Writes ``pictures`` as one PNG with the colors of the report. ``map_kind``: of their maps, see ColorScale."""
    gallery(path, pictures, ColorScale.from_model(model.calibration, len(model.flow.channels), kind=map_kind))
