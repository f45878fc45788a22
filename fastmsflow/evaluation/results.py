"""Metrics of a model on a test set."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np

STATED = 1e-4
"""The usual bound of ``pixel_error``."""


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one model on one test set, in [0, 1].

    None if one is not defined: the set has no masks or these mark nothing, or the model has no threshold.
    """

    image_auroc: float
    """AUROC of the published image score."""
    image_auroc_log: float
    """AUROC of the image score in log space."""
    image_auroc_absolute: float
    """AUROC of the absolute image score."""
    pixel_auroc: float | None = None
    """AUROC of the additive maps' pixels, as published: each map is relative to its own image."""
    pixel_auroc_absolute: float | None = None
    """AUROC of the absolute maps' pixels, which are comparable between images."""
    pixel_f1: float | None = None
    """The highest F1 of the additive maps at any threshold; optimistic, since it is the best for these images."""
    seg_f1_max: float | None = None
    """SegF1, the F1 of all pixels of a set at one threshold, of the absolute maps at the best threshold; optimistic,
    since it is the best for these images."""
    aupro: float | None = None
    """Exact AUPRO of the multiplicative maps 1 - exp(L), up to a false-positive rate of 0.3."""
    aupro_05: float | None = None
    """Exact AUPRO of the same maps up to a false-positive rate of 0.05."""
    aupro_absolute: float | None = None
    """Exact AUPRO of the absolute maps, up to 0.3."""
    aupro_absolute_05: float | None = None
    """Exact AUPRO of the absolute maps up to 0.05."""
    aupro_published: float | None = None
    """The published script's approximation of ``aupro`` by 800 thresholds, see fastmsflow.metrics.aupro_published; None
    also if that is not defined."""
    aupro_log: float | None = None
    """Exact AUPRO of -L: the same order of pixels, without the ties where exp(L) underflows."""
    seg_f1: float | None = None
    """SegF1 of the absolute maps at the calibrated pixel threshold, for which no defect was needed."""
    pixel_fpr: float | None = None
    """False-positive rate: share of all good pixels, those of defective images included, above that threshold."""
    false_pixel_rate: float | None = None
    """Mean share of a good test image's pixels above that threshold; the rate that the threshold was set for."""
    false_alarm_rate: float | None = None
    """Share of the good test images above the calibrated threshold of the absolute score."""
    recall: float | None = None
    """Share of the defective test images above that threshold."""
    f1: float | None = None
    """F1 of the images: harmonic mean of recall and precision at that threshold."""

    pixel_error: float | None = None
    """Bound on the difference of the pixel metrics from the exact ones; 0 if they are exact. Not a metric itself."""

    @classmethod
    def from_dict(cls, values: Mapping[str, float | None]) -> "Evaluation":
        """Builds an evaluation from what any version wrote: unknown metrics are ignored, missing ones are None."""
        return cls(**{field.name: values.get(field.name) for field in fields(cls)})  # type: ignore[arg-type]

    def as_dict(self) -> dict[str, float | None]:
        """Returns metric -> value."""
        return {name: getattr(self, name) for name in METRICS}

    def as_shown(self) -> dict[str, float | None]:
        """Returns metric -> value for the metrics that the set and the model allow; None if one is not defined."""
        # Without masks there is no error. A metric that an earlier version did not compute is left out.
        is_defined = self.aupro is not None
        undefined = ("aupro_published",) if is_defined else PIXEL_METRICS if self.pixel_error is not None else ()
        return {name: value for name, value in self.as_dict().items() if value is not None or name in undefined}


METRICS: tuple[str, ...] = tuple(field.name for field in fields(Evaluation) if field.name != "pixel_error")
# Metrics by which epochs are ranked: all but those at a threshold.
RANKING_METRICS = METRICS[: METRICS.index("seg_f1")]
PIXEL_METRICS = tuple(name for name in RANKING_METRICS if name.startswith(("pixel_", "seg_", "aupro")))
"""The metrics of maps that need masks, and no threshold."""


def mean_evaluation(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Returns the mean of the metrics that all have."""
    dicts = [asdict(evaluation) for evaluation in evaluations]
    values = {name: [each[name] for each in dicts] for name in dicts[0]}
    shared = {name: of for name, of in values.items() if None not in of}
    mean = {name: max(of) if name == "pixel_error" else float(np.mean(of)) for name, of in shared.items()}
    return Evaluation.from_dict(mean)


def exactness(pixel_error: float) -> str:
    """Returns a few words on how exact pixel metrics are."""
    if not pixel_error:
        return "pixel metrics: exact"
    text = f"pixel metrics: from histograms, within {pixel_error:.1e} of the exact ones"
    return text if pixel_error <= STATED else f"{text}, which is more than the usual {STATED:.0e}"
