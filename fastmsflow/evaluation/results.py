"""The metrics of a model on a test set."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

STATED = 1e-4
"""What ``pixel_error`` is expected not to exceed."""


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one model on one test set, in [0, 1]. None where the set has no masks, or the model no threshold."""

    image_auroc: float
    """Of the published image score."""
    image_auroc_log: float
    """Of the image score in log space."""
    image_auroc_absolute: float
    """Of the absolute image score."""
    pixel_auroc: float | None = None
    """Computed from the additive maps, as published: each is relative to its own image."""
    pixel_auroc_absolute: float | None = None
    """Computed from the absolute maps, whose pixels are comparable between images."""
    pixel_f1: float | None = None
    """The highest F1 of the additive maps at any threshold; optimistic, since it is the best for these images."""
    aupro: float | None = None
    """Exact, of the multiplicative maps 1 - exp(L), up to a false-positive rate of 0.3."""
    aupro_published: float | None = None
    """The published script's approximation of it, by 800 thresholds: see fastmsflow.metrics.aupro_published. None also
    where that is not defined."""
    aupro_log: float | None = None
    """Exact, of -L: the same order of pixels, without the ties where exp(L) underflows."""
    false_alarm_rate: float | None = None
    """Share of the good test images above the calibrated threshold of the absolute score."""
    recall: float | None = None
    """Share of the defective ones above it."""
    f1: float | None = None
    """Harmonic mean of recall and precision at it."""

    pixel_error: float | None = None
    """No metric: the exact pixel metrics differ from these by at most this; 0 where these are the exact ones."""

    @classmethod
    def from_dict(cls, values: Mapping[str, float | None]) -> "Evaluation":
        """Takes the metrics that are known here from what another version may have written; what lacks is None."""
        return cls(**{name: values.get(name) for name in (*METRICS, "pixel_error")})  # type: ignore[arg-type]

    def as_dict(self) -> dict[str, float | None]:
        """Metric -> value."""
        return {name: getattr(self, name) for name in METRICS}

    def as_shown(self) -> dict[str, float | None]:
        """Metric -> value of those that the set and the model allow for; None where one is not defined all the same."""
        undefined = {"aupro_published"} if self.aupro is not None else set()
        return {name: value for name, value in self.as_dict().items() if value is not None or name in undefined}


METRICS: tuple[str, ...] = tuple(field.name for field in fields(Evaluation) if field.name != "pixel_error")
# Those at a threshold are not for choosing an epoch by.
RANKING_METRICS = METRICS[: METRICS.index("false_alarm_rate")]


def exactness(pixel_error: float) -> str:
    """Of pixel metrics, in a few words."""
    if not pixel_error:
        return "pixel metrics: exact"
    text = f"pixel metrics: from histograms, within {pixel_error:.1e} of the exact ones"
    return text if pixel_error <= STATED else f"{text}, which is more than the usual {STATED:.0e}"
