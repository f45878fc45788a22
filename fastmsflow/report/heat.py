"""Which score map is shown, and on what scale: the same for every image of a model."""

from dataclasses import dataclass

import numpy as np

from ..calibration import Calibration
from ..errors import InputError
from ..scoring import Scores

# Good images take the first quarter of the scale, so that the rest tells slight defects from gross ones.
REACH = 4


@dataclass(frozen=True)
class Heat:
    """The absolute map of a calibrated model; else, since nothing is known of good images, the additive map."""

    levels: int
    """Of the flow."""
    absolute: bool
    scale: tuple[float, float]
    """Values of the first and the last colour."""
    region_threshold: float | None
    """Where a region begins."""

    @classmethod
    def of(cls, calibration: Calibration | None, levels: int, false_alarms: float | None = None) -> "Heat":
        """``false_alarms``: share of good images that may show a region; None: as calibrated, and no regions where
        there are too few held-out images for that.

        Errors: InputError where ``false_alarms`` is given and cannot be had.
        """
        if calibration is None:
            if false_alarms is not None:
                raise InputError("this model is not calibrated: `fastmsflow calibrate MODEL GOOD_IMAGES` first")
            return cls(levels, False, (0.0, float(levels)), None)
        try:
            region = calibration.region_threshold(false_alarms).value
        except InputError:
            if false_alarms is not None:
                raise
            region = None
        low = calibration.typical
        most_of_good = max(calibration.peaks) if region is None else region
        return cls(levels, True, (low, low + REACH * (most_of_good - low)), region)

    @property
    def caption(self) -> str:
        if not self.absolute:
            return f"additive score map (0: normal, {self.levels}: abnormal at every level)"
        regions = "" if self.region_threshold is None else f"; a region begins at {self.region_threshold:.2f}"
        return f"negative log-likelihood of a pixel, nats{regions}"

    def map(self, scores: Scores) -> np.ndarray:
        """(B, H, W) float32, larger where an image is abnormal."""
        return scores.shown_map(self.levels, self.absolute).float().cpu().numpy()
