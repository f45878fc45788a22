"""Checks what a metric takes and makes numpy arrays of it, without a copy where none is needed."""

from typing import Any

import numpy as np

from ..errors import InputError


def as_truth(labels: Any, what: str) -> np.ndarray:
    """Labels of any dtype that holds only 0 and 1 -> bool, same shape. Errors: InputError on any other value."""
    labels = _as_array(labels)
    if labels.dtype == np.bool_:
        return labels
    truth = labels == 1
    if not np.array_equal(truth, labels):
        raise InputError(f"{what} hold other values than 0 and 1; threshold them first, e.g. {what} > 0")
    return truth


def as_scores(scores: Any, what: str, shape: tuple[int, ...]) -> np.ndarray:
    """Real scores, in their own dtype but for 16-bit floats, which become float32.

    Errors: InputError where they are not real numbers or not of ``shape``. NaN is not looked for: see ``refuse_nan``.
    """
    scores = _as_array(scores)
    if scores.dtype.kind not in "fiub":
        raise InputError(f"{what} have dtype {scores.dtype}; give real numbers")
    if scores.shape != shape:
        raise InputError(f"{what} have shape {scores.shape}, their truth {shape}; give both the same shape")
    return scores.astype(np.float32) if scores.dtype == np.float16 else scores


def refuse_nan(ascending: np.ndarray, what: str) -> None:
    """Raises InputError where the sorted ``ascending`` holds a NaN: sorting puts them last."""
    if ascending.dtype.kind == "f" and np.isnan(ascending[-1]):
        raise InputError(f"{what} hold NaN; look for where the model overflows")


def _as_array(values: Any) -> np.ndarray:
    # A torch tensor, told by what it can do: this package needs no torch.
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        if values.is_floating_point() and values.element_size() == 2:
            values = values.float()  # numpy has no bfloat16
        return values.numpy()
    return np.asarray(values)
