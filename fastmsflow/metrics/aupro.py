"""Computes the area under the per-region overlap (PRO) curve.

Source: Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from ..number_range import COUNT, NumberRange, whole
from .defect_regions import pixel_weights
from .input_checks import as_labels, as_scores, refuse_nan

LIMIT = NumberRange(0, 1, open_low=True)


def aupro(masks: Any, maps: Any, fpr_limit: float = 0.3) -> float:
    """Computes the exact area under PRO over the false-positive rate up to ``fpr_limit``, divided by it; in [0, 1].

    At a threshold t, PRO is the mean over all regions of the share of a region's pixels with map >= t; a region is an
    8-connected component of a mask. The false-positive rate is the share of good pixels with map >= t. The curve runs
    through every distinct threshold, straight in between.

    ``masks`` (N, H, W): 1 (True) is defective, 0 good; ``maps`` (N, H, W): real, higher is more defective. Numpy
    arrays or torch tensors.

    Raises: InputError if the shapes differ or are not (N, H, W), a mask holds other values than 0 and 1, no pixel is
    defective or none is good, a map holds NaN, or ``fpr_limit`` is not in (0, 1].
    """
    return aupro_to_limits(masks, maps, [fpr_limit])[0]


def aupro_to_limits(masks: Any, maps: Any, fpr_limits: Sequence[float]) -> list[float]:
    """Computes ``aupro`` for each of ``fpr_limits``, and sorts the pixels once."""
    for limit in fpr_limits:
        checked_limit(limit)
    fpr, pro = _curve(*_sorted(masks, maps))
    return [_trapezoids(*_up_to(fpr, pro, limit)) / limit for limit in fpr_limits]


def pro_curve(masks: Any, maps: Any, fpr_limit: float = 0.3, points: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Returns points of the curve of ``aupro`` for a plot: (false-positive rates, PROs).

    Both are (points,) float64 and ascending, from (0, 0) to the rate ``fpr_limit``.

    The points lie on the exact curve and are evenly spaced along it, where the height and the width up to ``fpr_limit``
    weigh the same, so that steep parts are drawn well too: the area under the points, divided by ``fpr_limit``, differs
    from ``aupro`` by at most 1 / (2 (points - 1)). Arguments and errors are those of ``aupro``.

    Raises: InputError also if ``points`` is less than 2.
    """
    checked_limit(fpr_limit)
    return spread_along(*_curve(*_sorted(masks, maps)), fpr_limit, points)


def spread_along(x: np.ndarray, y: np.ndarray, limit: float, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns ``points`` points, as ``pro_curve`` does, of the curve (``x``, ``y``); both ascend from 0 to 1."""
    whole(2).check("points", points)
    fpr, pro = _up_to(x, y, limit)
    along = fpr / limit + pro
    at = np.linspace(0, along[-1], points)
    return np.interp(at, along, fpr), np.interp(at, along, pro)


def checked_limit(fpr_limit: float) -> float:
    """Returns ``fpr_limit``. Raises: InputError if it is not in (0, 1]."""
    LIMIT.check("fpr_limit", fpr_limit)
    return fpr_limit


def _sorted(masks: Any, maps: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Checks the arguments of ``aupro``, and returns the values of good pixels, ascending, those of defective pixels,
    ascending, and the weights of these."""
    is_defective = as_labels(masks, "masks")
    if is_defective.ndim != 3:
        raise InputError(f"masks have shape {is_defective.shape}; give (N, H, W)")
    values = as_scores(maps, "maps", is_defective.shape)
    good, defective = values[~is_defective], values[is_defective]
    if not good.size or not defective.size:
        raise InputError(
            f"PRO needs good and defective pixels; there are {good.size} and {defective.size}: add the missing images"
        )
    good.sort()
    order = np.argsort(defective)
    defective = defective[order]
    refuse_nan(good, "maps")
    refuse_nan(defective, "maps")
    return good, defective, np.concatenate([pixel_weights(mask) for mask in is_defective if mask.any()])[order]


def aupro_published(masks: Any, maps: Any, fpr_limit: float = 0.3, thresholds: int = 800) -> float | None:
    """Approximates the area under PRO as the published script does (arXiv 2308.15300), to compare with its figures.

    The thresholds are min, min + d, ... below max of all maps, d = (max - min) / ``thresholds`` in float32 for maps in
    float32. At each of them PRO and the false-positive rate are those of the pixels strictly above it. The points of a
    rate below ``fpr_limit`` are kept, (0, 0) is not added to them, and their rates are stretched to reach from 0 to 1.
    So the result is the mean height of that part of the curve, however short, and for maps that saturate it may be far
    from ``aupro``, which is exact. Arguments and errors are those of ``aupro``.

    Returns: the area; None if fewer than two points are kept, or all kept points have one rate.
    Raises: InputError also if ``thresholds`` is less than 1.
    """
    checked_limit(fpr_limit)
    good, defective, weights = _sorted(masks, maps)
    low, high = min(good[0], defective[0]), max(good[-1], defective[-1])
    if good.dtype.kind != "f":
        low, high = np.float64(low), np.float64(high)
    at = published_thresholds(low, high, thresholds)[::-1]
    fpr = 1 - np.searchsorted(good, at, side="right") / good.size
    covered = np.append(np.cumsum(weights[::-1])[::-1], 0.0)
    pro = covered[np.searchsorted(defective, at, side="right")] / covered[0]
    within = fpr < fpr_limit
    return mean_height(fpr[within], pro[within])


def published_thresholds(low: np.floating[Any], high: np.floating[Any], count: int) -> np.ndarray:
    """Returns the thresholds ``low``, ``low`` + d, ... below ``high``, where d = (``high`` - ``low``) / ``count``.

    There are none if d is 0 or infinite. As in the script, d has the dtype of the limits: its rounding matters for maps
    with few values.

    Raises: InputError if ``count`` is less than 1.
    """
    COUNT.check("thresholds", count)
    with np.errstate(over="ignore", invalid="ignore"):
        step = (high - low) / count
    if not 0 < step < np.inf:
        return np.empty(0)
    at = np.arange(low, high, step)
    return at[at < high]


def mean_height(x: np.ndarray, y: np.ndarray) -> float | None:
    """Returns the mean height of the curve (``x``, ``y``), where ``x`` ascends; None if the curve has no width."""
    width = float(x[-1] - x[0]) if len(x) else 0.0
    return _trapezoids(x, y) / width if width > 0 else None


def _curve(good: np.ndarray, defective: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the corners of the PRO curve as (false-positive rates, PROs), both from 0 to 1.

    ``good`` and ``defective`` ascend. PRO changes only at a defective value, which gives two corners: just above the
    value and at the value.
    """
    first = np.flatnonzero(np.append(True, defective[1:] != defective[:-1]))  # the first index of each distinct value
    distinct = defective[first]
    good_above = good.size - np.searchsorted(good, distinct, side="right")
    good_from = good.size - np.searchsorted(good, distinct, side="left")
    # Summed from the largest value down, so that 0 is exact; all weights sum to the number of regions.
    covered = np.append(np.cumsum(weights[::-1])[::-1], 0.0)
    covered /= covered[0]
    pro_above = covered[np.append(first[1:], defective.size)]
    pro_from = covered[first]
    fpr = np.stack([good_above, good_from], axis=1)[::-1].ravel() / good.size
    pro = np.stack([pro_above, pro_from], axis=1)[::-1].ravel()
    return np.concatenate([[0.0], fpr, [1.0]]), np.concatenate([[0.0], pro, [1.0]])


def _up_to(x: np.ndarray, y: np.ndarray, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the curve (x, y), where x ascends from 0 to 1, up to x = ``limit``."""
    beyond = int(np.searchsorted(x, limit, side="right"))
    y_at_limit = np.interp(limit, x[beyond - 1 : beyond + 1], y[beyond - 1 : beyond + 1])
    return np.append(x[:beyond], limit), np.append(y[:beyond], y_at_limit)


def _trapezoids(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1])) / 2)
