"""Area under the receiver operating characteristic."""

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
    truth = as_truth(labels, "labels")
    values = as_scores(scores, "scores", truth.shape)
    good, defective = values[~truth], values[truth]
    if not good.size or not defective.size:
        raise InputError(
            f"AUROC needs both classes; there are {good.size} good and {defective.size} defective: add the missing ones"
        )
    # Sorted queries walk through the other class in order, which is several times faster than jumping about.
    for part in (good, defective):
        part.sort()
        refuse_nan(part, "scores")
    below = np.searchsorted(good, defective, side="left").sum(dtype=np.int64)
    not_above = np.searchsorted(good, defective, side="right").sum(dtype=np.int64)
    return float(int(below + not_above) / (2 * good.size * defective.size))
