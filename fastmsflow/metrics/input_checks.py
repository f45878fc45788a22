"""Checks the arguments of metrics and converts them to numpy arrays, without a copy if possible."""

from typing import Any

import numpy as np

from ..errors import InputError


def as_labels(labels: Any, what: str) -> np.ndarray:
    """Converts labels 0 and 1 of any dtype to bool, in the same shape. Raises: InputError if there is another value."""
    labels = _as_array(labels, what)
    if labels.dtype == np.bool_:
        return labels
    defective = labels == 1
    if not np.array_equal(defective, labels):
        raise InputError(f"{what} hold other values than 0 and 1; threshold them first, e.g. {what} > 0")
    return defective


def as_scores(scores: Any, what: str, shape: tuple[int, ...]) -> np.ndarray:
    """Converts real scores to an array of their own dtype; 16-bit floats become float32.

    NaN is not looked for, see ``refuse_nan``.
    Raises: InputError if the scores are not real numbers or not of ``shape``.
    """
    scores = _as_array(scores, what)
    if scores.dtype.kind not in "fiub":
        raise InputError(f"{what} have dtype {scores.dtype}; give real numbers")
    if scores.shape != shape:
        raise InputError(f"{what} have shape {scores.shape}, their masks or labels {shape}; give both the same shape")
    return scores.astype(np.float32) if scores.dtype == np.float16 else scores


def refuse_nan(values: np.ndarray, what: str) -> None:
    """Raises: InputError if ``values`` hold a NaN."""
    if values.dtype.kind == "f" and values.size and np.isnan(values.max()):
        raise InputError(f"{what} hold NaN; look for where the model overflows")


def _as_array(values: Any, what: str) -> np.ndarray:
    # A torch tensor is recognized by its methods, since this package needs no torch.
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        if values.is_floating_point() and values.element_size() == 2:
            values = values.float()  # numpy has no bfloat16
        return values.numpy()
    try:
        return np.asarray(values)
    except Exception as error:  # ragged lists, and whatever calls itself an array
        raise InputError(f"{what} are no array ({' '.join(str(error).split())}); give an array or a tensor") from error
