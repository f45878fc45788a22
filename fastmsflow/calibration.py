"""Thresholds from good images alone, by the scores of images that were held out of training.

Distribution-free, by ranks (split conformal prediction; Vovk, Gammerman & Shafer, "Algorithmic Learning in a Random
World", 2005): of n held-out images and one new good image, each is as likely as any other to have the k-th largest
score, so a new good image lies above the k-th largest of the n with probability k / (n + 1). Over the choice of the
held-out images, the false-alarm rate of that threshold is distributed as Beta(k, n + 1 - k).

This holds as far as new good images are like the held-out ones: near-copies of training images held out (overlapping
crops, frames of a film) score too well, and new ones are above more often. That the same held-out images choose the
best round of a run favors them too, though slightly: one of a few choices, by their mean nll. ``Threshold.doubt`` tells
whether a test contradicts a threshold.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .errors import InputError
from .number_range import FALSE_PIXEL_RATES, FINITE, RATE
from .pixel_calibration import FALSE_PIXELS, PixelThreshold, PixelThresholds

__all__ = [
    "Calibration",
    "DecisionThreshold",
    "PixelThreshold",
    "PixelThresholds",
    "Threshold",
    "pixel_threshold",
    "region_threshold",
    "threshold",
]

FALSE_ALARMS = 0.05
CONFIDENCE = 0.95
DOUBT = 0.001
NOT_CALIBRATED = "this model is not calibrated: `fastmsflow calibrate MODEL GOOD_IMAGES` first"
NO_PIXEL_THRESHOLD = (
    "no threshold of pixels, since an earlier version calibrated this model: `fastmsflow calibrate MODEL GOOD_IMAGES`"
    " sets one"
)


@dataclass(frozen=True)
class Threshold:
    """Calls an image or a pixel defective if its score is above ``value``."""

    value: float
    """In nats."""
    false_alarms: float
    """The false-alarm rate that was asked for: the most that is expected."""
    low: float
    """Lower end of the 95% confidence interval of the rate reached, given these held-out images."""
    high: float
    """Its upper end."""
    images: int
    """Held-out good images behind it."""

    def __str__(self) -> str:
        return (
            f"{self.value:.4g} nats for {self.false_alarms:.2%} false alarms"
            f" (95% interval {self.low:.2%} to {self.high:.2%}, from {self.images} good images)"
        )

    def doubt(self, called: int, good: int) -> str | None:
        """Returns a warning with its remedy if ``called`` of ``good`` new good images are too many above the threshold.

        They are too many if chance, that of the held-out images included, explains them less than once in a thousand.
        """
        from scipy.stats import betabinom  # slow to import

        k = _rank(self.images, self.false_alarms)
        if betabinom.sf(called - 1, good, k, self.images + 1 - k) >= DOUBT:
            return None
        return (
            f"{called} of {good} good test images are above the threshold, more than by chance: they are unlike the"
            " held-out ones, or those are near-copies of training images; calibrate on images taken as new ones are"
        )

    def as_dict(self) -> dict[str, float]:
        """Returns the fields, fit for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Calibration:
    """Holds the scores of held-out good images, by fastmsflow.scoring's absolute score and map.

    These are comparable between images.
    """

    scores: tuple[float, ...]
    """The absolute score of each image, nats."""
    peaks: tuple[float, ...]
    """The largest value of each image's absolute map, nats."""
    typical: float
    """The median of the absolute map over all pixels, nats, at which the colors of heat maps begin."""
    false_alarms: float = FALSE_ALARMS
    """The rate that thresholds are for unless another is asked for."""
    pixels: PixelThresholds | None = None
    """The thresholds of the absolute map for rates of false pixels; None in checkpoints of earlier versions."""
    false_pixels: float = FALSE_PIXELS
    """The rate that the pixel threshold is for unless another is asked for."""

    def __post_init__(self) -> None:
        check_rate(self.false_alarms)
        FALSE_PIXEL_RATES.check("false_pixels", self.false_pixels)
        if len(self.scores) != len(self.peaks):
            raise InputError(f"{len(self.scores)} scores and {len(self.peaks)} peaks; give both of each image")
        if not np.isfinite([*self.scores, *self.peaks, self.typical]).all():
            raise InputError("a held-out image's score is not finite; look for where the model overflows")

    def is_enough(self, false_alarms: float | None = None) -> bool:
        """Tells whether there are images enough for a threshold at this rate."""
        return len(self.scores) >= needed(self.false_alarms if false_alarms is None else false_alarms)

    def shortage(self, false_alarms: float | None = None) -> str:
        """Returns the message, with the remedy, for too few images."""
        return _shortage(len(self.scores), self.false_alarms if false_alarms is None else false_alarms)

    def threshold(self, false_alarms: float | None = None) -> Threshold:
        """Returns the threshold of the absolute image score above which at most ``false_alarms`` of good images are
        expected.

        Raises: InputError if there are too few held-out images for so low a rate.
        """
        return threshold(self.scores, self.false_alarms if false_alarms is None else false_alarms)

    def region_threshold(self, false_alarms: float | None = None) -> Threshold:
        """Returns the threshold of the absolute map that at most ``false_alarms`` of good images are expected to pass
        anywhere.

        Raises: InputError if there are too few held-out images for so low a rate.
        """
        return threshold(self.peaks, self.false_alarms if false_alarms is None else false_alarms)

    @property
    def has_pixel_threshold(self) -> bool:
        """Tells whether there are thresholds for rates of false pixels; earlier versions kept none."""
        return self.pixels is not None

    def pixel_threshold(self, false_pixels: float | None = None) -> PixelThreshold:
        """Returns the lowest threshold of the absolute map that keeps the mean share of a good image's pixels above it
        at most ``false_pixels``; None: the rate of the calibration.

        The rates 1, 1.5, 2, 3, 4, 5, 6 and 8 times a power of ten have thresholds, and another rate takes that of the
        next lower one. See fastmsflow.pixel_calibration for what the rate and its interval mean.
        Raises: InputError if the rate is not within 0.00001 and 0.1, or the model was calibrated by an earlier version.
        """
        if self.pixels is None:
            raise InputError(NO_PIXEL_THRESHOLD)
        return self.pixels.at(self.false_pixels if false_pixels is None else false_pixels, len(self.scores))

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields, fit for JSON; ``from_dict`` reads them."""
        lists = {"scores": list(self.scores), "peaks": list(self.peaks)}
        return {**asdict(self), **lists, "pixels": self.pixels and self.pixels.as_dict()}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Calibration":
        """Makes a calibration from the result of ``as_dict``.

        Raises: InputError if the scores are not finite or not as many as the peaks.
        """
        pixels = content.get("pixels")
        tuples = {"scores": tuple(content["scores"]), "peaks": tuple(content["peaks"])}
        return cls(**{**content, **tuples, "pixels": pixels and PixelThresholds.from_dict(pixels)})


@dataclass(frozen=True)
class DecisionThreshold:
    """The threshold that labels images: an absolute score above ``value`` is called defective."""

    value: float
    """In nats."""
    text: str
    """The value and its origin, for people."""

    def __post_init__(self) -> None:
        FINITE.check("threshold", self.value)

    @classmethod
    def from_calibration(
        cls, calibration: Calibration | None, false_alarms: float | None, value: float | None
    ) -> "DecisionThreshold | None":
        """Returns the threshold ``value`` in nats or, where that is None, the calibrated one for ``false_alarms``.

        ``false_alarms``: share of good images that may be called defective; None: the rate of the calibration.

        Returns: None without a calibration, or if no rate was asked for and the calibration has no threshold.
        Raises: InputError if ``value`` is not finite, or ``calibration`` has no threshold for ``false_alarms``.
        """
        if value is not None:
            FINITE.check("threshold", value)
            return cls(value, f"{value:.4g} nats, as given")
        if calibration is None or (false_alarms is None and not calibration.is_enough()):
            return None
        calibrated = calibration.threshold(false_alarms)
        return cls(calibrated.value, str(calibrated))


def region_threshold(calibration: Calibration | None, false_alarms: float | None) -> float | None:
    """Returns the value of the absolute map, in nats, above which a region begins.

    ``false_alarms``: share of good images that may show a region; None: the rate of the calibration.

    Returns: None if no rate was asked for and the calibration has no threshold.
    Raises: InputError if ``calibration`` has no threshold for ``false_alarms``.
    """
    if calibration is None and false_alarms is not None:
        raise InputError(NOT_CALIBRATED)
    if calibration is None or (false_alarms is None and not calibration.is_enough()):
        return None
    return calibration.region_threshold(false_alarms).value


def pixel_threshold(calibration: Calibration | None, false_pixels: float | None = None) -> PixelThreshold | None:
    """Returns the threshold of pixels for ``false_pixels``; None: the rate of the calibration.

    Returns: None if no rate was asked for and the calibration has no threshold of pixels.
    Raises: InputError if ``calibration`` has no threshold for ``false_pixels``.
    """
    if calibration is None and false_pixels is not None:
        raise InputError(NOT_CALIBRATED)
    if calibration is None or (false_pixels is None and not calibration.has_pixel_threshold):
        return None
    return calibration.pixel_threshold(false_pixels)


def threshold(scores: Any, false_alarms: float) -> Threshold:
    """Returns the lowest threshold that keeps the expected rate of false alarms at or below ``false_alarms``.

    ``scores`` (n,): those of held-out good images, higher is more abnormal.
    Raises: InputError if the rate is not within 0 and 1, or n < 1 / rate - 1: even the largest score is then passed too
    often.
    """
    check_rate(false_alarms)
    ordered = np.sort(np.asarray(scores, dtype=np.float64))[::-1]
    n = len(ordered)
    if n < needed(false_alarms):
        raise InputError(_shortage(n, false_alarms))
    from scipy.stats import beta  # slow to import

    k = _rank(n, false_alarms)
    tail = (1 - CONFIDENCE) / 2
    low, high = beta.ppf([tail, 1 - tail], k, n + 1 - k)
    return Threshold(float(ordered[k - 1]), false_alarms, float(low), float(high), n)


def needed(false_alarms: float) -> int:
    """Returns how many held-out images a threshold for this rate takes."""
    n = max(0, math.floor(1 / false_alarms) - 2)
    while _rank(n, false_alarms) < 1:
        n += 1
    return n


def _shortage(images: int, false_alarms: float) -> str:
    # The lowest rate that so many images suffice for, rounded up to the digits that are printed.
    allowed = math.ceil(1e4 / (images + 1)) / 1e4
    return (
        f"a false-alarm rate of {false_alarms:.2%} needs {needed(false_alarms)} held-out good images, and there are"
        f" {images}: give more, or allow {allowed:.2%}"
    )


def check_rate(false_alarms: float) -> None:
    """Raises: InputError if ``false_alarms`` is not above 0 and below 1."""
    RATE.check("false_alarms", false_alarms)


def _rank(n: int, false_alarms: float) -> int:
    # So that 0.05 of 19 + 1 is 1, whatever the product rounds to.
    return math.floor(false_alarms * (n + 1) + 1e-9)
