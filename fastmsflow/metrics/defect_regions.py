"""Finds defective regions: the 8-connected components of a mask."""

from typing import Any

import numpy as np
from scipy import ndimage

from ..errors import InputError
from .input_checks import as_labels

EIGHT_CONNECTED = np.ones((3, 3), dtype=bool)


class Regions:
    """Holds the defective pixels of masks (B, H, W), where 1 (True) is defective, for many maps of the same images.

    Raises: InputError if the masks are not (B, H, W) or hold other values than 0 and 1.
    """

    def __init__(self, masks: Any) -> None:
        is_defective = as_labels(masks, "masks")
        if is_defective.ndim != 3:
            raise InputError(f"masks have shape {is_defective.shape}; give (B, H, W)")
        self.shape = is_defective.shape
        # For each image the flat indices of its defective pixels, and 1 / the size of each one's region.
        self.pixels = [
            (np.flatnonzero(mask), pixel_weights(mask)) if mask.any() else (np.empty(0, np.intp), np.empty(0))
            for mask in is_defective
        ]


def pixel_weights(mask: np.ndarray) -> np.ndarray:
    """Returns 1 / the size of its region for each defective pixel, in the order of ``mask`` (H, W) bool."""
    region = ndimage.label(mask, EIGHT_CONNECTED)[0][mask]
    return 1 / np.bincount(region)[region]
