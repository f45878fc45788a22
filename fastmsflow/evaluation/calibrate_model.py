"""Calibration of a model on image files."""

from collections.abc import Callable, Sequence
from pathlib import Path

from ..calibration import Calibration
from ..data import ImageFileDataset
from ..files import shown
from ..inference import AUTO, prepare
from ..models.msflow import MSFlow
from ..pixel_calibration import FALSE_PIXELS
from .evaluate import score_images
from .evaluator import Calibrator


def calibrate_on_files(
    model: MSFlow,
    files: Sequence[Path],
    *,
    false_alarms: float,
    false_pixels: float = FALSE_PIXELS,
    dtype: str = AUTO,
    workers: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> Calibration:
    """Returns the calibration of ``model`` on the good images ``files``, for rates of ``false_alarms`` and of
    ``false_pixels``.

    ``dtype``: see fastmsflow.inference.resolve_dtype; ``workers``: processes that read images; ``progress`` is called
    with the number of images that are scored. A model with a tiling scores images in tiles.

    Raises: InputError if an image cannot be read, or its score is not finite.
    """
    calibrator = Calibrator([shown(file) for file in files])
    dataset = ImageFileDataset(files, model.image_size)
    for numbers, scores in score_images([prepare(model, dtype)], dataset, workers=workers, progress=progress):
        calibrator.add(numbers, scores[0])
    return calibrator.calibration(false_alarms, false_pixels)
