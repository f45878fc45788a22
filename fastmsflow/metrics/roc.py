"""Area under the receiver operating characteristic, and the best F1 on it."""

from typing import Any

import numpy as np

from ..errors import InputError
from .arrays import as_scores, as_truth, refuse_nan


def auroc(labels: Any, scores: Any) -> float:
    """Exact area under the ROC, in [0, 1]: the chance that a defective item scores higher than a good one, ties
    counting half (Mann-Whitney U over the number of pairs).

    ``labels``: 1 (True) is defective, 0 good; ``scores``: real, higher is more defective. Numpy arrays or torch
    tensors of one same shape, whichever: image scores (N,), pixel maps (N, H, W).
    Errors: InputError where shapes differ, a label is neither 0 nor 1, only one class is there, or a score is NaN.
    """
    return _auroc(*_sorted(labels, scores, "AUROC"))


def f1_max(labels: Any, scores: Any) -> float:
    """The highest F1 (harmonic mean of precision and recall) at any threshold t, what scores >= t being called
    defective; in (0, 1]. The threshold is the best for these very items, so the figure is optimistic.

    Arguments and errors: as ``auroc``.
    """
    return _f1_max(*_sorted(labels, scores, "F1"))


def auroc_and_f1_max(labels: Any, scores: Any) -> tuple[float, float]:
    """Both, from items sorted once. Arguments and errors: as ``auroc``."""
    good, defective = _sorted(labels, scores, "AUROC")
    return _auroc(good, defective), _f1_max(good, defective)


def _auroc(good: np.ndarray, defective: np.ndarray) -> float:
    # Sorted queries walk through the other class in order, which is several times faster than jumping about.
    below = np.searchsorted(good, defective, side="left").sum(dtype=np.int64)
    not_above = np.searchsorted(good, defective, side="right").sum(dtype=np.int64)
    return float(int(below + not_above) / (2 * good.size * defective.size))


def _f1_max(good: np.ndarray, defective: np.ndarray) -> float:
    distinct, first = np.unique(defective, return_index=True)
    hits = defective.size - first
    false_alarms = good.size - np.searchsorted(good, distinct, side="left")
    return float((2 * hits / (defective.size + hits + false_alarms)).max())


def _sorted(labels: Any, scores: Any, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """-> scores of the good and of the defective, each ascending. Checks what ``auroc`` takes."""
    truth = as_truth(labels, "labels")
    values = as_scores(scores, "scores", truth.shape)
    good, defective = values[~truth], values[truth]
    if not good.size or not defective.size:
        raise InputError(
            f"{metric} needs both classes; there are {good.size} good and {defective.size} defective:"
            " add the missing ones"
        )
    for part in (good, defective):
        part.sort()
        refuse_nan(part, "scores")
    return good, defective
