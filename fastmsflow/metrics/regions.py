"""Defective regions: 8-connected components of a mask."""

from typing import Any

import numpy as np
from scipy import ndimage

from ..errors import InputError
from .arrays import as_truth

EIGHT_CONNECTED = np.ones((3, 3), dtype=bool)


class Regions:
    """The defective pixels of masks (B, H, W), 1 (True) being defective: found once, for many maps of the same images.

    Errors: InputError where masks are not (B, H, W) or hold other values than 0 and 1.
    """

    def __init__(self, masks: Any) -> None:
        truth = as_truth(masks, "masks")
        if truth.ndim != 3:
            raise InputError(f"masks have shape {truth.shape}; give (B, H, W)")
        self.shape = truth.shape
        # Of each image: where its defective pixels are, flat, and 1 / the size of the region of each.
        self.pixels = [
            (np.flatnonzero(mask), pixel_weights(mask)) if mask.any() else (np.empty(0, np.intp), np.empty(0))
            for mask in truth
        ]


def pixel_weights(mask: np.ndarray) -> np.ndarray:
    """1 / the size of its region, for each defective pixel in the order of ``mask`` (H, W) bool."""
    region = ndimage.label(mask, EIGHT_CONNECTED)[0][mask]
    return 1 / np.bincount(region)[region]
