"""Computes the area under the receiver operating characteristic, and F1 at a threshold and at the best one."""

from typing import Any

import numpy as np

from ..errors import InputError
from ..number_range import FINITE
from .input_checks import as_labels, as_scores, refuse_nan


def auroc(labels: Any, scores: Any) -> float:
    """Computes the exact area under the ROC, in [0, 1].

    This is the probability that a defective item scores higher than a good one, where a tie counts half: the
    Mann-Whitney U over the number of pairs. ``labels``: 1 (True) is defective, 0 good; ``scores``: real, higher is more
    defective. Both are numpy arrays or torch tensors of the same shape: image scores (N,) or pixel maps (N, H, W).

    Raises: InputError if the shapes differ, a label is neither 0 nor 1, one class is missing, or a score is NaN.
    """
    return _auroc(*_sorted(labels, scores, "AUROC"))


def f1_max(labels: Any, scores: Any) -> float:
    """Computes the highest F1 (harmonic mean of precision and recall) at any threshold, in (0, 1].

    Items whose score is at least the threshold are called defective. The threshold is the best one for these very
    items, so the figure is optimistic. Arguments and errors are those of ``auroc``.
    """
    return _f1_max(*_sorted(labels, scores, "F1"))


def f1_at(labels: Any, scores: Any, threshold: float) -> float:
    """Computes the F1 (harmonic mean of precision and recall) at ``threshold``, in [0, 1].

    Items whose score is above the threshold are called defective. The threshold is one that was known before, so the
    figure is not optimistic. The other arguments and errors are those of ``auroc``.

    Raises: InputError also if the threshold is not finite.
    """
    FINITE.check("threshold", threshold)
    is_defective = as_labels(labels, "labels")
    values = as_scores(scores, "scores", is_defective.shape)
    refuse_nan(values, "scores")
    defective = int(np.count_nonzero(is_defective))
    _refuse_one_class(is_defective.size - defective, defective, "F1")
    # In float64, or it would be rounded to the dtype of the scores.
    above = values > np.float64(threshold)
    return f1_of_counts(int(np.count_nonzero(above & is_defective)), int(np.count_nonzero(above)), defective)


def f1_of_counts(hits: int, called: int, defective: int) -> float:
    """Returns the F1 if ``called`` items are called defective and ``hits`` of these are among the ``defective``."""
    return 2 * hits / (defective + called)


def auroc_and_f1_max(labels: Any, scores: Any) -> tuple[float, float]:
    """Computes both metrics and sorts the items once; arguments and errors are those of ``auroc``."""
    good, defective = _sorted(labels, scores, "AUROC")
    return _auroc(good, defective), _f1_max(good, defective)


def _auroc(good: np.ndarray, defective: np.ndarray) -> float:
    # Sorted queries pass through the other class in order, which is several times faster than random access.
    below = np.searchsorted(good, defective, side="left").sum(dtype=np.int64)
    not_above = np.searchsorted(good, defective, side="right").sum(dtype=np.int64)
    return float(int(below + not_above) / (2 * good.size * defective.size))


def _f1_max(good: np.ndarray, defective: np.ndarray) -> float:
    distinct, first = np.unique(defective, return_index=True)
    hits = defective.size - first
    false_alarms = good.size - np.searchsorted(good, distinct, side="left")
    return float((2 * hits / (defective.size + hits + false_alarms)).max())


def _sorted(labels: Any, scores: Any, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Checks the arguments of ``auroc``, and returns the scores of good and of defective items, each ascending."""
    is_defective = as_labels(labels, "labels")
    values = as_scores(scores, "scores", is_defective.shape)
    good, defective = values[~is_defective], values[is_defective]
    _refuse_one_class(good.size, defective.size, metric)
    for of_class in (good, defective):
        of_class.sort()
        refuse_nan(of_class, "scores")
    return good, defective


def _refuse_one_class(good: int, defective: int, metric: str) -> None:
    if not good or not defective:
        raise InputError(
            f"{metric} needs both classes; there are {good} good and {defective} defective: add the missing ones"
        )
