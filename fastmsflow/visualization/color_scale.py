"""Chooses the score map that pictures show, and its range of values: the same for every image of a model."""

from dataclasses import dataclass

from ..calibration import Calibration, region_threshold
from ..scoring import MapKind, shown_map

# Good images take the first quarter of the colors; the rest tells slight defects from gross ones.
REACH = 4


@dataclass(frozen=True)
class ColorScale:
    """The score map that pictures show, and its range of values."""

    levels: int
    """Number of levels of the flow."""
    kind: MapKind
    scale: tuple[float, float]
    """The values of the first and the last color."""
    region_threshold: float | None
    """The value of the absolute map at which a region begins; None: there are no regions."""

    @classmethod
    def from_model(
        cls,
        calibration: Calibration | None,
        levels: int,
        false_alarms: float | None = None,
        kind: MapKind | None = None,
    ) -> "ColorScale":
        """Returns the scale of a model with ``levels`` levels.

        ``false_alarms``: share of good images that may show a region; None: the rate of the calibration, and no regions
        if there are too few held-out images for that. ``kind``: see fastmsflow.scoring.shown_map.

        Raises: InputError if ``calibration`` has no threshold for ``false_alarms``, or no map of ``kind``.
        """
        kind = shown_map(calibration is not None, kind)
        scale = (0.0, 1.0 if kind == "multiplicative" else float(levels))
        region = region_threshold(calibration, false_alarms)
        if calibration is not None and kind == "absolute":
            low = calibration.typical
            most_of_good = max(calibration.peaks) if region is None else region
            scale = (low, low + REACH * (most_of_good - low))
        return cls(levels, kind, scale, region)

    @property
    def mark(self) -> float | None:
        """The value of this map where a region begins; None: this map does not show it."""
        return self.region_threshold if self.kind == "absolute" else None

    @property
    def caption(self) -> str:
        """The meaning of the values, for the legend."""
        if self.kind == "additive":
            return f"additive score map (0: the image's most normal pixel, {self.levels}: abnormal at every level)"
        if self.kind == "multiplicative":
            return "multiplicative score map (0: the image's most normal pixel, 1: abnormal)"
        regions = "" if self.mark is None else f"; a region begins at {self.mark:.2f}"
        return f"negative log-likelihood of a pixel, nats{regions}"
