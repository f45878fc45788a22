"""Thresholds of the absolute map for a rate of false pixels, from good images alone.

The rate is the mean, over good images, of the share of an image's pixels above the threshold: each image counts the
same, whatever its size. Neighboring pixels are not independent, so the interval comes from the images: it is a
bootstrap that draws whole images.

The rate holds on average over the images it was measured on, and within its interval for new good images like them.
A guarantee for a finite number of images (conformal risk control; Angelopoulos et al. 2022, arXiv 2208.02814) would
take at least 1 / rate - 1 images, since one more image may be above the threshold as a whole.
"""

from array import array
from dataclasses import asdict, astuple, dataclass
from typing import Any

import numpy as np

from .errors import InputError
from .number_range import FALSE_PIXEL_RATES

FALSE_PIXELS = 0.001
RATES = (*(float(f"{digits}e{power}") for power in range(-5, -1) for digits in (1, 1.5, 2, 3, 4, 5, 6, 8)), 0.1)
"""The rates for which a calibration keeps thresholds."""
# Steps of 2.3%, after one of 1e-6: by so much a threshold's rate may be below the one that was asked for.
SHARES = np.append(0, np.logspace(-6, 0, 601))
CONFIDENCE = 0.95
REPLICATES, SEED = 1000, 0
# The replicates whose weights are held at once.
AT_ONCE = 100
# The shares are float32, as a rate that was asked for may be.
ROUNDING = 1e-6
# With fewer images, but for a single one, the interval is said to be too narrow.
ENOUGH = 20


@dataclass(frozen=True)
class PixelThreshold:
    """Calls a pixel defective if the absolute map is above ``value``."""

    value: float
    """In nats."""
    false_pixels: float
    """The rate that it keeps: the mean share of a good image's pixels above it is at most this."""
    low: float
    """Lower end of the 95% interval of that mean share for new good images, by a bootstrap over the images."""
    high: float
    """Its upper end. With fewer than about 20 images the interval is too narrow, and so it is wherever a kind of good
    image with many false pixels is too rare to be among them."""
    images: int
    """Held-out good images behind it."""

    def __str__(self) -> str:
        doubt = ", too few: it is too narrow" if 1 < self.images < ENOUGH else ""
        return (
            f"{self.value:.4g} nats for {_percent(self.false_pixels)} false pixels (the mean share of a good image's"
            f" pixels; 95% interval {_percent(self.low)} to {_percent(self.high)} by a bootstrap over {self.images}"
            f" good {'image' if self.images == 1 else 'images'}{doubt})"
        )

    def as_dict(self) -> dict[str, float]:
        """Returns the fields, fit for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class PixelThresholds:
    """Holds the threshold for each of a few rates of false pixels, and its interval."""

    rates: tuple[float, ...]
    """Ascending."""
    values: tuple[float, ...]
    """The thresholds in nats, which fall as the rates rise."""
    low: tuple[float, ...]
    """The lower ends of the intervals of the rates."""
    high: tuple[float, ...]
    """The upper ends."""

    def __post_init__(self) -> None:
        lengths = {len(self.values), len(self.low), len(self.high)}
        if not self.rates or lengths != {len(self.rates)}:
            raise InputError("its pixel thresholds are not one for each rate; write the checkpoint again")
        rates, values, low, high = (np.array(of, dtype=np.float64) for of in astuple(self))
        are_shares = rates[0] > 0 and rates[-1] < 1 and (low >= 0).all() and (low <= high).all() and (high <= 1).all()
        in_order = (np.diff(rates) > 0).all() and (np.diff(values) <= 0).all()
        # Maps are float32. NaN is in no order.
        if not are_shares or not in_order or not (np.abs(values) <= np.finfo(np.float32).max).all():
            raise InputError("its pixel thresholds are no falling numbers for rising rates; write the checkpoint again")

    @classmethod
    def from_profiles(cls, profiles: np.ndarray) -> "PixelThresholds":
        """Returns the lowest threshold that keeps each of RATES over N images, at least one.

        ``profiles`` (N, 2, 602): see ``tail_profile``. The interval of a single image is 0 to 1.
        """
        rates = np.array(RATES)
        values = lowest_thresholds(profiles, rates)
        low, high = _intervals(profiles, rates) if len(profiles) > 1 else (np.zeros(len(rates)), np.ones(len(rates)))
        return cls(RATES, tuple(values.tolist()), tuple(low.tolist()), tuple(high.tolist()))

    def at(self, false_pixels: float, images: int) -> PixelThreshold:
        """Returns the threshold for the largest rate that is at most ``false_pixels``, of ``images`` images.

        Raises: InputError if the rate is out of the range.
        """
        FALSE_PIXEL_RATES.check("false_pixels", false_pixels)
        # A file of another version may begin with another rate.
        i = max(0, int(np.searchsorted(self.rates, float(false_pixels) * (1 + ROUNDING), side="right")) - 1)
        return PixelThreshold(self.values[i], self.rates[i], self.low[i], self.high[i], images)

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields, fit for JSON; ``from_dict`` reads them."""
        return {name: list(values) for name, values in asdict(self).items()}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "PixelThresholds":
        """Makes thresholds from the result of ``as_dict``.

        Raises: InputError if there is not one for each rate, or they do not fall as the rates rise.
        """
        return cls(**{name: tuple(values) for name, values in content.items()})


def tail_profile(score_map: np.ndarray) -> np.ndarray:
    """Returns the profile (2, 602) float32 of a map (H, W) float32, however many pixels that has.

    It has the map's values at the ranks of SHARES, descending, and the exact shares of the pixels above them.
    """
    ordered = np.sort(score_map, axis=None)
    pixels = ordered.size
    # So that 0.001 of 1000 is 1, whatever the product rounds to.
    ranks = np.minimum(np.floor(SHARES * pixels + 1e-9).astype(np.intp), pixels - 1)
    values = ordered[pixels - 1 - ranks]
    above = pixels - np.searchsorted(ordered, values, side="right")
    return np.stack([values, above / pixels]).astype(np.float32)


def as_profiles(values: "array[float]") -> np.ndarray:
    """Returns the profiles (N, 2, 602) in a buffer of float32, one after the other."""
    return np.frombuffer(values, np.float32).reshape(-1, 2, len(SHARES))


def lowest_thresholds(profiles: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """Returns the lowest thresholds (K,) above which the mean share of pixels is at most each of ``rates`` (K,).

    ``profiles`` (N, 2, 602). Between two values of a profile, the share above the lower one is taken, which is too high
    by a step of SHARES at most.
    """
    values, shares = profiles[:, 0].ravel(), profiles[:, 1].astype(np.float64)
    order = np.argsort(values)[::-1]
    # Just below each value, an image's share is that of its next value; below its last one, it is 1.
    rises = np.diff(shares, append=1.0, axis=1).ravel()[order]
    mean = np.cumsum(rises) / len(profiles)
    first_beyond = np.searchsorted(mean, rates * (1 + ROUNDING), side="right")
    return values[order][np.minimum(first_beyond, len(values) - 1)].astype(np.float64)


def shares_above(profiles: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Returns the share (N, K) of each image's pixels above ``thresholds`` (K,), as ``lowest_thresholds`` counts it."""
    return np.stack(
        [np.append(shares, 1)[np.searchsorted(-values, -thresholds, side="left")] for values, shares in profiles]
    )


def _intervals(profiles: np.ndarray, rates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ends (K,) of the intervals of the rates reached on new images by thresholds for ``rates`` (K,).

    Each replicate draws as many images with replacement, and finds its own thresholds. These are to all images as the
    thresholds of all images are to all that could be taken: the rates that they reach on all images are spread alike.
    """
    images = len(profiles)
    shares = shares_above(profiles, lowest_thresholds(profiles, SHARES))
    of_all = shares.mean(axis=0)
    generator = np.random.default_rng(SEED)
    reached: list[np.ndarray] = []
    for _ in range(REPLICATES // AT_ONCE):
        drawn = generator.multinomial(images, np.full(images, 1 / images), AT_ONCE)
        means = drawn @ shares / images
        # The first threshold is above all pixels, so at least one keeps the rate.
        last = np.stack([(means <= rate * (1 + ROUNDING)).sum(axis=1) - 1 for rate in rates], axis=1)
        reached.append(of_all[last])
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(reached), [tail, 1 - tail], axis=0)
    return low, high


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"
