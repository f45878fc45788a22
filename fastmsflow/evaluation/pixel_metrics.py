"""Computes pixel metrics of a test set: exactly from all maps at once, or within a bound in constant memory."""

from collections.abc import Sequence

import numpy as np
import torch

from ..distributed.process_group import ProcessGroup
from ..metrics import Bins, PixelHistogram, Regions, aupro, aupro_published, pro_curve
from ..metrics.aupro import aupro_to_limits
from ..metrics.auroc import auroc_and_f1_max
from ..scoring import Scores

MAPS_PER_IMAGE = 4
"""Number of maps of an image that metrics are computed from."""
LIMITS = (0.3, 0.05)
"""The false-positive rates up to which AUPRO is computed: as published, and as people now use it."""
Curve = tuple[np.ndarray, np.ndarray]
UNDEFINED: dict[str, float | None] = {"pixel_error": 0.0}
"""The metrics if no pixel is defective or none is good: none, and that exactly."""
SAMPLE_PIXELS = 2**23
"""Pixels, 32 images of 512x512, whose maps each process holds first, to choose the bins by them."""


class ExactPixelMetrics:
    """Computes exact pixel metrics; holds two maps of each image and its mask."""

    def __init__(self, images: int, size: tuple[int, int]) -> None:
        self._additive = torch.empty(images, *size)
        self._peaks = torch.empty(images)
        self._log_likelihood = torch.empty(images, *size)
        self._masks = np.empty((images, *size), np.bool_)

    def add(self, numbers: Sequence[int], scores: Scores, masks: np.ndarray) -> None:
        """Adds the scores of the images of ``numbers``, finite float32 on the CPU, and their masks (B, H, W) bool."""
        numbers = list(numbers)
        self._additive[numbers] = scores.score_map_add
        self._peaks[numbers] = scores.peak
        self._log_likelihood[numbers] = scores.log_likelihood
        self._masks[numbers] = masks

    def complete(self) -> None:
        """Does nothing; see BinnedPixelMetrics."""

    def compute(self) -> dict[str, float | None]:
        """Computes the pixel metrics, by their names in Evaluation.

        All are None if no pixel is defective or none is good. Raises: InputError if one of fastmsflow.metrics does.
        """
        if not self._is_defined():
            return UNDEFINED
        multiplicative = self._multiplicative()
        absolute = -(self._log_likelihood + self._peaks[:, None, None])
        pixel_auroc, pixel_f1 = auroc_and_f1_max(self._masks, self._additive)
        pixel_auroc_absolute, seg_f1_max = auroc_and_f1_max(self._masks, absolute)
        aupro_30, aupro_05 = aupro_to_limits(self._masks, multiplicative, LIMITS)
        aupro_absolute, aupro_absolute_05 = aupro_to_limits(self._masks, absolute, LIMITS)
        return {
            "pixel_auroc": pixel_auroc,
            "pixel_auroc_absolute": pixel_auroc_absolute,
            "pixel_f1": pixel_f1,
            "seg_f1_max": seg_f1_max,
            "aupro": aupro_30,
            "aupro_05": aupro_05,
            "aupro_absolute": aupro_absolute,
            "aupro_absolute_05": aupro_absolute_05,
            "aupro_published": aupro_published(self._masks, multiplicative),
            "aupro_log": aupro(self._masks, -self._log_likelihood),
            "pixel_error": 0.0,
        }

    def pro_curve(self) -> Curve | None:
        """Returns the curve of the multiplicative maps, see fastmsflow.metrics.pro_curve; None as for ``compute``."""
        return pro_curve(self._masks, self._multiplicative()) if self._is_defined() else None

    def _is_defined(self) -> bool:
        return bool(self._masks.any()) and not self._masks.all()

    def _multiplicative(self) -> torch.Tensor:
        return 1 - self._log_likelihood.exp()


class BinnedPixelMetrics:
    """Computes pixel metrics from histograms, in constant memory; the first maps of all processes choose the bins.

    The processes choose the bins together, each when it has SAMPLE_PIXELS or all of its images: once each, and before
    they exchange anything else, so that none waits for ever.
    """

    def __init__(self, levels: int, world: ProcessGroup) -> None:
        self._levels = levels
        self._world = world
        self._sample: list[tuple[np.ndarray, list[np.ndarray]]] = []
        self._histograms: list[PixelHistogram] = []

    def add(self, numbers: Sequence[int], scores: Scores, masks: np.ndarray) -> None:
        """Adds the scores of images of one size and their masks; see ExactPixelMetrics."""
        maps = [score_map.numpy() for score_map in self._maps(scores)]
        if self._histograms:
            regions = Regions(masks)
            for histogram, score_map in zip(self._histograms, maps, strict=True):
                histogram.update(regions, score_map)
            return
        self._sample.append((masks, maps))
        if sum(masks.size for masks, _ in self._sample) >= SAMPLE_PIXELS:
            self._choose_bins()

    def complete(self) -> None:
        """Ends the adding; all processes call this before they exchange anything else."""
        if not self._histograms:
            self._choose_bins()

    def compute(self) -> dict[str, float | None]:
        """Computes the metrics of all processes' maps; all call this after ``complete``.

        All are None if no pixel is defective or none is good. Raises: InputError if one of fastmsflow.metrics does.
        """
        if self._world.size > 1:
            for histogram in self._histograms:
                histogram.all_reduce()
        additive, multiplicative, log, absolute = self._histograms
        if not additive.has_both_classes():
            return UNDEFINED
        aupro_30, aupro_05 = (multiplicative.aupro(limit) for limit in LIMITS)
        aupro_absolute, aupro_absolute_05 = (absolute.aupro(limit) for limit in LIMITS)
        metrics = {
            "pixel_auroc": additive.auroc(),
            "pixel_auroc_absolute": absolute.auroc(),
            "pixel_f1": additive.f1_max(),
            "seg_f1_max": absolute.f1_max(),
            "aupro": aupro_30,
            "aupro_05": aupro_05,
            "aupro_absolute": aupro_absolute,
            "aupro_absolute_05": aupro_absolute_05,
            "aupro_published": multiplicative.aupro_published(shift=1.0),
            "aupro_log": log.aupro(),
        }
        error = max(metric.error for metric in metrics.values() if metric is not None)
        return {**{name: metric and metric.value for name, metric in metrics.items()}, "pixel_error": error}

    def pro_curve(self) -> Curve | None:
        """Returns the curve of the multiplicative maps, after ``compute``; see fastmsflow.metrics.pro_curve."""
        multiplicative = self._histograms[1]
        return multiplicative.pro_curve() if multiplicative.has_both_classes() else None

    def _maps(self, scores: Scores) -> list[torch.Tensor]:
        # Ranks pixels as the exact maps do, up to rounding. The highest value is subtracted, which is exact: the maps
        # of a model that fits badly then crowd at 0, where bins are narrow.
        return [
            scores.score_map_add - self._levels,
            scores.score_map_mul - 1,
            -scores.log_likelihood,
            scores.absolute_map,
        ]

    def _choose_bins(self) -> None:
        regions = [Regions(masks) for masks, _ in self._sample]
        for kind in range(MAPS_PER_IMAGE):
            sample = [(of_batch, maps[kind]) for of_batch, (_, maps) in zip(regions, self._sample, strict=True)]
            histogram = PixelHistogram(Bins.from_samples(sample, across_ranks=self._world.size > 1))
            for of_batch, score_map in sample:
                histogram.update(of_batch, score_map)
            self._histograms.append(histogram)
        self._sample.clear()


PixelMetricsAccumulator = ExactPixelMetrics | BinnedPixelMetrics
