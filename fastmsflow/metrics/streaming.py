"""Pixel metrics of any number of maps in constant memory: histograms, and what they leave open as a bound."""

from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError
from .arrays import as_scores
from .bins import Bins, as_float32, reduced
from .pro import checked_limit, mean_height, published_thresholds, spread_along
from .regions import Regions


class Bounded(NamedTuple):
    """A metric as a histogram tells it."""

    value: float
    """The estimate; for F1 the highest that a bin's edge reaches."""
    low: float
    """No lower is the exact metric of the same maps,"""
    high: float
    """and no higher, rounding in float64 apart."""

    @property
    def error(self) -> float:
        """The exact metric is within this of ``value``."""
        return max(self.high - self.value, self.value - self.low)

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.error:.1e}"


class PixelHistogram:
    """Counts what AUROC, AUPRO and F1 need of maps in bins: maps are looked at once and not kept.

    Good and defective pixels are counted, the latter also weighted so that each region (an 8-connected component of a
    mask) weighs 1 in all. Each bin knows the lowest and the highest value it has seen: a bin of one value is a tie,
    which costs no accuracy. In another bin the order of the pixels is open, so the exact curve runs anywhere between
    its corners; metrics come with the areas under the lowest and the highest such curve, which bound the exact one for
    any maps. With 65,536 bins that suit the maps the error is some 1e-5. It is surely at most 1e-4 where no bin of
    several values holds more than 1/5000 of the good pixels (for AUPRO, ``fpr_limit`` / 5000), or none more than 1/5000
    of the defective ones (for AUPRO, by weight; for F1 only this, and 1/20,000).
    """

    def __init__(self, bins: Bins) -> None:
        self.bins = bins
        self._good = np.zeros(bins.number, np.int64)
        self._defective = np.zeros(bins.number, np.int64)
        self._weight = np.zeros(bins.number)
        self._lowest = np.full(bins.number, np.inf, np.float32)
        self._highest = np.full(bins.number, -np.inf, np.float32)

    def update(self, masks: Any, maps: Any) -> None:
        """Takes in ``maps`` (B, H, W), real, higher is more defective, taken as float32; ``masks``: ``Regions``, or
        what they are made of. Errors: InputError for other shapes, or NaN."""
        regions = masks if isinstance(masks, Regions) else Regions(masks)
        for image, (at, weights) in zip(as_scores(maps, "maps", regions.shape), regions.pixels, strict=True):
            values = as_float32(image)
            if values.size and np.isnan(values.max()):
                raise InputError("maps hold NaN; look for where the model overflows")
            numbers = self.bins.of_values(values)
            self._note_extremes(numbers, values)
            self._good += np.bincount(numbers, minlength=self.bins.number)
            if at.size:
                numbers = numbers[at]
                counts = np.bincount(numbers, minlength=self.bins.number)
                self._good -= counts
                self._defective += counts
                self._weight += np.bincount(numbers, weights, self.bins.number)

    def _note_extremes(self, numbers: np.ndarray, values: np.ndarray) -> None:
        # Few are new once some images are in, and looking is cheaper than writing.
        new = values < self._lowest.take(numbers)
        if new.any():
            np.minimum.at(self._lowest, numbers[new], values[new])
        new = values > self._highest.take(numbers)
        if new.any():
            np.maximum.at(self._highest, numbers[new], values[new])

    def merge(self, other: "PixelHistogram") -> None:
        """Adds what ``other`` has seen. Errors: InputError where its bins are not the same."""
        if self.bins != other.bins:
            raise InputError("these histograms have different bins; make both with the same Bins")
        self._good += other._good
        self._defective += other._defective
        self._weight += other._weight
        np.minimum(self._lowest, other._lowest, out=self._lowest)
        np.maximum(self._highest, other._highest, out=self._highest)

    def all_reduce(self, device: str = "cpu") -> None:
        """Adds up what all ranks of torch.distributed's default group have seen, on each of them; counts are exact.

        ``device``: where the group's backend reduces ("cuda" for nccl). To be called on every rank. Errors: InputError
        on all of them where their bins are not the same.
        """
        mark = np.array([self.bins.mark])
        if reduced(mark, "min", device) != reduced(mark, "max", device):
            raise InputError("the ranks' histograms have different bins; make Bins with across_ranks=True")
        self._good = reduced(self._good, "sum", device)
        self._defective = reduced(self._defective, "sum", device)
        self._weight = reduced(self._weight, "sum", device)
        self._lowest = reduced(self._lowest, "min", device)
        self._highest = reduced(self._highest, "max", device)

    def auroc(self) -> Bounded:
        """Area under the ROC of pixels, see fastmsflow.metrics.auroc. Errors: InputError where no pixel is good or none
        is defective."""
        return self._area(self._defective, 1.0)

    def aupro(self, fpr_limit: float = 0.3) -> Bounded:
        """See fastmsflow.metrics.aupro. Errors: InputError as ``auroc``, or where ``fpr_limit`` is not in (0, 1]."""
        return self._area(self._weight, checked_limit(fpr_limit))

    def aupro_published(self, fpr_limit: float = 0.3, thresholds: int = 800, shift: float = 0.0) -> Bounded | None:
        """See fastmsflow.metrics.aupro_published, of maps that were given less ``shift``, which spaces no threshold
        otherwise. A threshold's counts are open by the one bin that it falls into. Errors: as ``aupro``.

        A threshold in a bin next to ``fpr_limit`` leaves open which point is the last, and the bound is wider: from 0
        to 1 where it leaves open whether two points are left. None where too few are left as far as can be told.
        """
        checked_limit(fpr_limit)
        good, weight = self._counted(self._good), self._counted(self._weight)
        seen = np.flatnonzero(self._good + self._defective)
        lowest, highest = (part[seen].astype(np.float64) + shift for part in (self._lowest, self._highest))
        at = published_thresholds(np.float32(lowest[0]), np.float32(highest[-1]), thresholds)[::-1].astype(np.float64)
        # From which bin on all values are above a threshold, and from which on any are.
        surely, perhaps = (np.searchsorted(part, at, side="right") for part in (lowest, highest))
        above_good = good.sum() - np.append(0, np.cumsum(good[seen]))
        above_weight = _from_the_top(weight[seen])[::-1]
        below = above_good[0] - np.stack([above_good[surely], above_good[perhaps]])
        fpr = 1 - below / above_good[0]
        pro = np.stack([above_weight[surely], above_weight[perhaps]]) / above_weight[0]
        # In between: as if a bin's values were evenly spread.
        inside = np.minimum(perhaps, len(seen) - 1)
        width = np.where(perhaps < surely, highest[inside] - lowest[inside], 1.0)
        part = np.where(perhaps < surely, (highest[inside] - at) / width, 0.0).clip(0, 1)
        x, y = (low + part * (high - low) for low, high in (fpr, pro))
        value = mean_height(x[x < fpr_limit], y[x < fpr_limit])
        if value is None:
            return None
        low, high = _mean_heights(fpr, pro, fpr_limit)
        return Bounded(min(max(value, low), high), low, high)

    def pro_curve(self, fpr_limit: float = 0.3, points: int = 200) -> tuple[np.ndarray, np.ndarray]:
        """See fastmsflow.metrics.pro_curve: the same of the curve that ``aupro``'s value is the area under."""
        fpr, pro = (_from_the_top(part) for part in (self._counted(self._good), self._counted(self._weight)))
        return spread_along(fpr / fpr[-1], pro / pro[-1], checked_limit(fpr_limit), points)

    def f1_max(self) -> Bounded:
        """The highest F1 of pixels at any threshold, see fastmsflow.metrics.f1_max. Errors: as ``auroc``."""
        false, true = (_from_the_top(part) for part in (self._counted(self._good), self._counted(self._defective)))
        value = float((2 * true[1:] / (true[-1] + true[1:] + false[1:])).max())
        # At best all of a bin's defective pixels are above all of its good ones.
        best = (2 * true[1:] / (true[-1] + true[1:] + false[:-1]))[self._open()]
        return Bounded(value, value, max(value, float(best.max(initial=0.0))))

    def _area(self, gained: np.ndarray, limit: float) -> Bounded:
        """Under the curve of ``gained`` over the good pixels, up to their share ``limit``, divided by it."""
        x, y = (_from_the_top(part) for part in (self._counted(self._good), self._counted(gained)))
        x, y = x / x[-1], y / y[-1]
        step = np.diff(x)
        width = np.clip(limit - x[:-1], 0, step)
        part = np.divide(width, step, out=np.zeros_like(width), where=step > 0)
        rise = np.diff(y)
        value = width @ (y[:-1] + rise * part / 2)
        open_ = self._open()
        low = value - width[open_] @ (rise * part)[open_] / 2
        high = value + width[open_] @ (rise * (1 - part / 2))[open_]
        return Bounded(float(value) / limit, float(low) / limit, float(high) / limit)

    def _open(self) -> np.ndarray:
        """Tells for each bin, from the highest one down, if several values are in the bin."""
        return (self._lowest < self._highest)[::-1]

    def _counted(self, what: np.ndarray) -> np.ndarray:
        good, defective = int(self._good.sum()), int(self._defective.sum())
        if not good or not defective:
            raise InputError(
                f"pixel metrics need good and defective pixels; there are {good} and {defective}:"
                " add the missing images"
            )
        return what


def _from_the_top(counts: np.ndarray) -> np.ndarray:
    """0, then the sums of ``counts`` over the highest bin, the two highest, ..."""
    return np.append(0, np.cumsum(counts[::-1]))


def _mean_heights(fpr: np.ndarray, pro: np.ndarray, limit: float) -> tuple[float, float]:
    """The least and the most that the mean height may be of a curve from its first point to its last one below
    ``limit``. ``fpr``, ``pro`` (2, K), ascending: the least and the most of each point's.

    The curve rises, so its mean is the larger the further right its ends are and the further left its other points.
    """
    found: list[float] = []
    for last in range(np.count_nonzero(fpr[1] < limit) - 1, np.count_nonzero(fpr[0] < limit)):
        if last < 1:
            return 0.0, 1.0
        for ends, inner, height in ((0, 1, pro[0]), (1, 0, pro[1])):
            first, end = fpr[ends, 0], min(fpr[ends, last], limit)
            x = np.concatenate([[first], fpr[inner, 1:last].clip(first, end), [end]])
            mean = mean_height(x, height[: last + 1])
            found.append(float(height[0 if ends == 0 else last]) if mean is None else mean)
    return min(found), max(found)
