"""Computes pixel metrics of any number of maps in constant memory, from histograms that bound the exact values."""

from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError
from ..number_range import FINITE
from .aupro import checked_limit, mean_height, published_thresholds, spread_along
from .defect_regions import Regions
from .histogram_bins import Bins, as_float32, reduced
from .input_checks import as_scores, refuse_nan


class Bounded(NamedTuple):
    """A metric that a histogram estimates, with bounds."""

    value: float
    """The estimate; for F1 the highest value at an edge of a bin."""
    low: float
    """The exact metric of the same maps is at least this, up to rounding in float64."""
    high: float
    """The exact metric of the same maps is at most this, up to rounding in float64."""

    @property
    def error(self) -> float:
        """The bound on the difference between the exact metric and ``value``."""
        return max(self.high - self.value, self.value - self.low)

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.error:.1e}"


class PixelHistogram:
    """Counts pixels in bins, which suffices for AUROC, AUPRO and F1; maps are read once and not stored.

    Good and defective pixels are counted, the latter also with weights, so that each region (an 8-connected component
    of a mask) weighs 1 in total. Each bin stores its lowest and highest value: a bin of a single value is a tie, which
    costs no accuracy. In any other bin the order of the pixels is unknown, so the exact curve lies anywhere between the
    bin's corners; the areas under the lowest and the highest such curve bound the exact metric for any maps. With
    65,536 bins that suit the maps the error is about 1e-5. The error is at most 1e-4 if no bin of several values holds
    more than 1/5000 of the good pixels (for AUPRO, ``fpr_limit`` / 5000), or none more than 1/5000 of the defective
    ones (for AUPRO, by weight; for F1 only this, and 1/20,000).
    """

    def __init__(self, bins: Bins) -> None:
        self.bins = bins
        self._good = np.zeros(bins.number, np.int64)
        self._defective = np.zeros(bins.number, np.int64)
        self._weight = np.zeros(bins.number)
        self._lowest = np.full(bins.number, np.inf, np.float32)
        self._highest = np.full(bins.number, -np.inf, np.float32)

    def update(self, masks: Any, maps: Any) -> None:
        """Counts the pixels of ``maps`` (B, H, W), real numbers taken as float32; higher is more defective.

        ``masks``: ``Regions``, or the masks that these take.
        Raises: InputError if the shapes differ or a map holds NaN.
        """
        regions = masks if isinstance(masks, Regions) else Regions(masks)
        for image, (at, weights) in zip(as_scores(maps, "maps", regions.shape), regions.pixels, strict=True):
            values = as_float32(image)
            refuse_nan(values, "maps")
            numbers = self.bins.of_values(values)
            self._update_extremes(numbers, values)
            self._good += np.bincount(numbers, minlength=self.bins.number)
            if at.size:
                numbers = numbers[at]
                counts = np.bincount(numbers, minlength=self.bins.number)
                self._good -= counts
                self._defective += counts
                self._weight += np.bincount(numbers, weights, self.bins.number)

    def _update_extremes(self, numbers: np.ndarray, values: np.ndarray) -> None:
        # Few values are new extremes after some images, and a comparison is cheaper than a write.
        new = values < self._lowest.take(numbers)
        if new.any():
            np.minimum.at(self._lowest, numbers[new], values[new])
        new = values > self._highest.take(numbers)
        if new.any():
            np.maximum.at(self._highest, numbers[new], values[new])

    def merge(self, other: "PixelHistogram") -> None:
        """Adds the counts of ``other``. Raises: InputError if its bins are not the same."""
        if self.bins != other.bins:
            raise InputError("these histograms have different bins; make both with the same Bins")
        self._good += other._good
        self._defective += other._defective
        self._weight += other._weight
        np.minimum(self._lowest, other._lowest, out=self._lowest)
        np.maximum(self._highest, other._highest, out=self._highest)

    def all_reduce(self, device: str = "cpu") -> None:
        """Sums the counts over all ranks of torch.distributed's default group, exactly; every rank calls this.

        ``device``: the device on which the group's backend reduces ("cuda" for nccl).
        Raises: InputError on all ranks if their bins are not the same.
        """
        mark = np.array([self.bins.mark])
        if reduced(mark, "min", device) != reduced(mark, "max", device):
            raise InputError("the ranks' histograms have different bins; make Bins with across_ranks=True")
        self._good = reduced(self._good, "sum", device)
        self._defective = reduced(self._defective, "sum", device)
        self._weight = reduced(self._weight, "sum", device)
        self._lowest = reduced(self._lowest, "min", device)
        self._highest = reduced(self._highest, "max", device)

    def has_both_classes(self) -> bool:
        """Returns whether there are good and defective pixels, without which no metric is defined."""
        return bool(self._good.any()) and bool(self._defective.any())

    def auroc(self) -> Bounded:
        """Computes the area under the ROC of pixels, see fastmsflow.metrics.auroc.

        Raises: InputError if no pixel is good or none is defective.
        """
        return self._area(self._defective, 1.0)

    def aupro(self, fpr_limit: float = 0.3) -> Bounded:
        """Computes the area under PRO, see fastmsflow.metrics.aupro.

        Raises: InputError if no pixel is good or none is defective, or ``fpr_limit`` is not in (0, 1].
        """
        return self._area(self._weight, checked_limit(fpr_limit))

    def aupro_published(self, fpr_limit: float = 0.3, thresholds: int = 800, shift: float = 0.0) -> Bounded | None:
        """Approximates the area under PRO, see fastmsflow.metrics.aupro_published.

        ``shift`` is added to the maps first, for maps from which it was subtracted; the thresholds' spacing does not
        change. Counts at a threshold are uncertain by the bin into which the threshold falls. A threshold in a bin next
        to ``fpr_limit`` makes the last point uncertain, and the bound wider.

        Returns: None if it is not certain that two points are left.
        Raises: the errors of ``aupro``.
        """
        checked_limit(fpr_limit)
        totals = self._from_the_top(self._weight)
        seen = np.flatnonzero(self._good + self._defective)
        lowest, highest = (values[seen].astype(np.float64) + shift for values in (self._lowest, self._highest))
        at = published_thresholds(np.float32(lowest[0]), np.float32(highest[-1]), thresholds)[::-1].astype(np.float64)
        # The first bins all of whose values, and any of whose values, are above a threshold.
        surely, perhaps = (np.searchsorted(values, at, side="right") for values in (lowest, highest))
        above_good, above_weight = (sums[::-1][np.append(seen, self.bins.number)] for sums in totals)
        below = above_good[0] - np.stack([above_good[surely], above_good[perhaps]])
        fpr = 1 - below / above_good[0]
        pro = np.stack([above_weight[surely], above_weight[perhaps]]) / above_weight[0]
        # Within a bin, values are assumed to be evenly spread.
        inside = np.minimum(perhaps, len(seen) - 1)
        width = np.where(perhaps < surely, highest[inside] - lowest[inside], 1.0)
        share = np.where(perhaps < surely, (highest[inside] - at) / width, 0.0).clip(0, 1)
        x, y = (low + share * (high - low) for low, high in (fpr, pro))
        value = mean_height(x[x < fpr_limit], y[x < fpr_limit])
        bounds = _mean_heights(fpr, pro, fpr_limit)
        if value is None or bounds is None:
            return None
        low, high = bounds
        return Bounded(min(max(value, low), high), low, high)

    def pro_curve(self, fpr_limit: float = 0.3, points: int = 200) -> tuple[np.ndarray, np.ndarray]:
        """Returns points of the curve whose area ``aupro`` is, see fastmsflow.metrics.pro_curve."""
        fpr, pro = self._from_the_top(self._weight)
        return spread_along(fpr / fpr[-1], pro / pro[-1], checked_limit(fpr_limit), points)

    def f1_max(self) -> Bounded:
        """Computes the highest F1 of pixels at any threshold, see fastmsflow.metrics.f1_max.

        Raises: InputError if no pixel is good or none is defective.
        """
        false, true = self._from_the_top(self._defective)
        value = float((2 * true[1:] / (true[-1] + true[1:] + false[1:])).max())
        # In the best case all of a bin's defective pixels are above all of its good ones.
        best = (2 * true[1:] / (true[-1] + true[1:] + false[:-1]))[self._has_several_values()]
        return Bounded(value, value, max(value, float(best.max(initial=0.0))))

    def f1_at(self, threshold: float) -> Bounded:
        """Computes the F1 of pixels above ``threshold``, see fastmsflow.metrics.f1_at.

        The bin into which the threshold falls is uncertain, unless all of its values lie on one side.

        Raises: InputError if no pixel is good or none is defective, or the threshold is not finite.
        """
        FINITE.check("threshold", threshold)
        false, true = self._from_the_top(self._defective)
        seen = np.flatnonzero(self._good + self._defective)
        lowest, highest = self._lowest[seen].astype(np.float64), self._highest[seen].astype(np.float64)
        # The first bins all of whose values, and any of whose values, are above the threshold.
        surely, perhaps = (int(np.searchsorted(values, threshold, side="right")) for values in (lowest, highest))
        edges = np.append(seen, self.bins.number)[[surely, perhaps]]
        (false_low, false_high), (true_low, true_high) = (sums[::-1][edges] for sums in (false, true))
        # Within a bin, values are assumed to be evenly spread.
        inside = slice(perhaps, surely)
        share = float(((highest[inside] - threshold) / (highest[inside] - lowest[inside])).sum())
        hits, false_hits = true_low + share * (true_high - true_low), false_low + share * (false_high - false_low)
        value, low, high = (
            float(2 * hit / (true[-1] + hit + miss))
            for hit, miss in ((hits, false_hits), (true_low, false_high), (true_high, false_low))
        )
        return Bounded(value, low, high)

    def _area(self, gained: np.ndarray, limit: float) -> Bounded:
        """Computes the area under ``gained`` over the good pixels, up to their share ``limit``, divided by it."""
        x, y = self._from_the_top(gained)
        x, y = x / x[-1], y / y[-1]
        step = np.diff(x)
        width = np.clip(limit - x[:-1], 0, step)
        share = np.divide(width, step, out=np.zeros_like(width), where=step > 0)
        rise = np.diff(y)
        value = width @ (y[:-1] + rise * share / 2)
        uncertain = self._has_several_values()
        low = value - width[uncertain] @ (rise * share)[uncertain] / 2
        high = value + width[uncertain] @ (rise * (1 - share / 2))[uncertain]
        return Bounded(float(value) / limit, float(low) / limit, float(high) / limit)

    def _has_several_values(self) -> np.ndarray:
        """Returns for each bin, from the highest down, whether it holds several values."""
        return (self._lowest < self._highest)[::-1]

    def _from_the_top(self, gained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns 0 and then the sums over the highest bin, the two highest bins, and so on, of the good pixels and of
        ``gained``. Raises: InputError if no pixel is good or none is defective."""
        good, defective = int(self._good.sum()), int(self._defective.sum())
        if not good or not defective:
            raise InputError(
                f"pixel metrics need good and defective pixels; there are {good} and {defective}:"
                " add the missing images"
            )
        x, y = (np.append(0, np.cumsum(counts[::-1])) for counts in (self._good, gained))
        return x, y


def _mean_heights(fpr: np.ndarray, pro: np.ndarray, limit: float) -> tuple[float, float] | None:
    """Returns the bounds of the mean height of a curve from its first point to its last one below ``limit``; None if
    there may be no second point.

    ``fpr``, ``pro`` (2, K), ascending, hold the lower and the upper bound of each point. The curve rises, so its mean
    is larger if its ends are further right and its other points further left.
    """
    means: list[float] = []
    for last in range(np.count_nonzero(fpr[1] < limit) - 1, np.count_nonzero(fpr[0] < limit)):
        if last < 1:
            return None
        for ends, inner, height in ((0, 1, pro[0]), (1, 0, pro[1])):
            first, end = fpr[ends, 0], min(fpr[ends, last], limit)
            x = np.concatenate([[first], fpr[inner, 1:last].clip(first, end), [end]])
            mean = mean_height(x, height[: last + 1])
            means.append(float(height[0 if ends == 0 else last]) if mean is None else mean)
    return min(means), max(means)
