"""Pixel metrics of a test set: exact, of all maps at once; or in constant memory, within a bound."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..distributed.process_group import ProcessGroup
from ..metrics import Bins, PixelHistogram, Regions, aupro, aupro_published, auroc, pro_curve
from ..metrics.roc import auroc_and_f1_max
from ..scoring import Scores

KINDS = 4
"""Maps of an image that metrics are of."""
Curve = tuple[np.ndarray, np.ndarray]
SAMPLE_PIXELS = 2**23
"""Of so many pixels, 32 images of 512x512, each process keeps its first maps, for bins that suit them."""


class PixelMetrics(NamedTuple):
    """As fastmsflow.training.Evaluation has them."""

    pixel_auroc: float
    pixel_auroc_absolute: float
    pixel_f1: float
    aupro: float
    aupro_published: float | None
    aupro_log: float
    pixel_error: float


class ExactPixelMetrics:
    """Exact: keeps two maps an image and its mask."""

    def __init__(self, images: int, size: tuple[int, int]) -> None:
        self._additive = torch.empty(images, *size)
        self._peaks = torch.empty(images)
        self._log_likelihood = torch.empty(images, *size)
        self._masks = np.empty((images, *size), np.bool_)

    def add(self, numbers: Sequence[int], scores: Scores, masks: np.ndarray) -> None:
        """``scores``: of the images of ``numbers``, finite, float32 on the CPU; ``masks``: theirs, (B, H, W) bool."""
        numbers = list(numbers)
        self._additive[numbers] = scores.score_map_add
        self._peaks[numbers] = scores.peak
        self._log_likelihood[numbers] = scores.log_likelihood
        self._masks[numbers] = masks

    def complete(self) -> None:
        """Nothing is left to do."""

    def figures(self) -> PixelMetrics:
        """Errors: InputError as the metrics'."""
        multiplicative = self._multiplicative()
        absolute = -(self._log_likelihood + self._peaks[:, None, None])
        pixel_auroc, pixel_f1 = auroc_and_f1_max(self._masks, self._additive)
        return PixelMetrics(
            pixel_auroc,
            auroc(self._masks, absolute),
            pixel_f1,
            aupro(self._masks, multiplicative),
            aupro_published(self._masks, multiplicative),
            aupro(self._masks, -self._log_likelihood),
            0.0,
        )

    def pro_curve(self) -> Curve:
        """Of the multiplicative maps; see fastmsflow.metrics.pro_curve."""
        return pro_curve(self._masks, self._multiplicative())

    def _multiplicative(self) -> torch.Tensor:
        return 1 - self._log_likelihood.exp()


class BinnedPixelMetrics:
    """In constant memory: counts of what has been seen, in bins that suit the first maps of all processes.

    The processes make their bins together, each when it has seen SAMPLE_PIXELS or all it will: once each, and
    before anything else that they do together, so that none waits for ever.
    """

    def __init__(self, levels: int, size: tuple[int, int], world: ProcessGroup) -> None:
        self._levels = levels
        self._size = size
        self._world = world
        self._first: list[tuple[np.ndarray, list[np.ndarray]]] = []
        self._histograms: list[PixelHistogram] = []

    def add(self, numbers: Sequence[int], scores: Scores, masks: np.ndarray) -> None:
        """See ExactPixelMetrics."""
        maps = [of_kind.numpy() for of_kind in self._maps(scores)]
        if self._histograms:
            self._count(masks, maps)
            return
        self._first.append((masks, maps))
        if sum(masks.size for masks, _ in self._first) >= SAMPLE_PIXELS:
            self._begin()

    def complete(self) -> None:
        """When all maps are in; for all processes to call, before anything else that they do together."""
        if not self._histograms:
            self._begin()

    def figures(self) -> PixelMetrics:
        """Of all processes' maps, after ``complete``; for all to call. Errors: InputError as the metrics'."""
        if self._world.size > 1:
            for histogram in self._histograms:
                histogram.all_reduce()
        additive, multiplicative, log, absolute = self._histograms
        published = multiplicative.aupro_published(shift=1.0)
        found = {
            "pixel_auroc": additive.auroc(),
            "pixel_auroc_absolute": absolute.auroc(),
            "pixel_f1": additive.f1_max(),
            "aupro": multiplicative.aupro(),
            "aupro_log": log.aupro(),
        }
        error = max(metric.error for metric in (*found.values(), published) if metric is not None)
        values = {name: metric.value for name, metric in found.items()}
        return PixelMetrics(**values, aupro_published=published and published.value, pixel_error=error)

    def pro_curve(self) -> Curve:
        """After ``figures``. See ExactPixelMetrics."""
        return self._histograms[1].pro_curve()

    def _maps(self, scores: Scores) -> list[torch.Tensor]:
        # In the order of pixels of the exact ones, but for how differences from 0 to ``levels`` are rounded. Less their
        # highest value, which rounds no further, maps of a model that fits badly crowd at 0, where bins are narrow;
        # pixels that their own rounding makes equal, where exp(L) is small, stay equal.
        return [
            scores.score_map_add - self._levels,
            scores.score_map_mul - 1,
            -scores.log_likelihood,
            scores.absolute_map,
        ]

    def _begin(self) -> None:
        nothing = np.empty((0, *self._size), np.float32)
        regions = Regions(np.concatenate([nothing.astype(bool), *(masks for masks, _ in self._first)]))
        for kind in range(KINDS):
            sample = np.concatenate([nothing, *(maps[kind] for _, maps in self._first)])
            bins = Bins.from_sample(regions, sample, across_ranks=self._world.size > 1)
            self._histograms.append(PixelHistogram(bins))
            self._histograms[kind].update(regions, sample)
        self._first.clear()

    def _count(self, masks: np.ndarray, maps: Sequence[np.ndarray]) -> None:
        regions = Regions(masks)
        for histogram, of_kind in zip(self._histograms, maps, strict=True):
            histogram.update(regions, of_kind)


Pixels = ExactPixelMetrics | BinnedPixelMetrics
