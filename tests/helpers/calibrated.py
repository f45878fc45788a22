"""Models that have learned nothing, with thresholds by which images of noise are good or defective."""

from pathlib import Path

import torch

from fastmsflow import MSFlow
from fastmsflow.calibration import Calibration
from fastmsflow.data import load_image


def calibrated(images: list[Path], size: tuple[int, int], without_region: int = 0) -> MSFlow:
    """A model for images of ``size`` (H, W) by which half of ``images`` are defective, and all but ``without_region``
    have a defective region."""
    torch.manual_seed(0)
    model = MSFlow("test_efficientnet", pretrained=False, image_size=size, blocks=(1, 1, 1)).eval()
    with torch.no_grad():
        scores = model.scores(torch.stack([load_image(path, size) for path in images]))
    half = len(images) // 2
    middle = float(scores.absolute_score.sort().values[half - 1 : half + 1].mean())
    peaks = scores.absolute_map.flatten(1).amax(dim=1).sort().values
    below_all = 0.9 * peaks[:1]
    peak = float(torch.cat([below_all, peaks])[without_region : without_region + 2].mean())
    pixel = float(scores.absolute_map.flatten().median())
    model.calibration = Calibration((middle,) * 20, (peak,) * 20, pixel)
    return model
