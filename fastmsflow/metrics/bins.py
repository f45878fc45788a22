"""65,536 bins for real numbers, narrow where a sample of them is dense."""

import zlib
from typing import Any

import numpy as np

from ..errors import InputError
from .arrays import as_scores
from .regions import Regions

BINS = 65_536
# A float32's sign, its exponent and the first 5 bits of its mantissa: 32 cells from a number to its double.
LOW_BITS = 18
CELLS = 1 << (32 - LOW_BITS)


class Bins:
    """Bins that hold every float32: cells of 1/32 to 1/64 of their values' size, narrower towards 0, each halved as
    often as its share of a sample asks for.

    A third of the bins each goes by the good pixels, the defective ones, and those weighted so that every region
    counts the same. Values that crowd at another number than 0, closer than a thousandth of it, are better given less
    that number.
    """

    def __init__(self, counts: np.ndarray, bins: int = BINS) -> None:
        """``counts`` (M, CELLS): how often values of each of M kinds were in each cell; a kind never seen is left out.
        ``bins``: at most so many. Errors: InputError where that is less than twice CELLS."""
        if bins < 2 * CELLS:
            raise InputError(f"bins is {bins}; give at least {2 * CELLS}")
        totals = counts.sum(axis=1, keepdims=True)
        shares = (counts / np.where(totals > 0, totals, 1)).sum(axis=0) / max(1, np.count_nonzero(totals))
        halvings = np.log2(np.maximum(1, shares * (bins - CELLS))).astype(np.int32).clip(max=LOW_BITS)
        sizes = 1 << halvings.astype(np.int64)
        self.number = int(sizes.sum())
        """The number of bins."""
        self._shift = LOW_BITS - halvings
        self._first = (np.cumsum(sizes) - sizes).astype(np.int32)
        self.mark = zlib.crc32(halvings.tobytes())
        """Differs, all but surely, where bins do."""

    @classmethod
    def from_sample(
        cls, masks: Any, maps: Any, bins: int = BINS, across_ranks: bool = False, device: str = "cpu"
    ) -> "Bins":
        """For values like those of a sample, ``maps`` (B, H, W) with ``masks``, as PixelHistogram.update takes them.

        ``across_ranks``: of all ranks' samples together, see PixelHistogram.all_reduce.
        """
        regions = masks if isinstance(masks, Regions) else Regions(masks)
        counts = np.zeros((3, CELLS))
        for image, (at, weights) in zip(as_scores(maps, "maps", regions.shape), regions.pixels, strict=True):
            cells = _cells(_ordered(as_float32(image)))
            counts[0] += np.bincount(cells, minlength=CELLS)
            defective = np.bincount(cells[at], minlength=CELLS)
            counts[:2] += np.stack([-defective, defective])
            counts[2] += np.bincount(cells[at], weights, CELLS)
        return cls(reduced(counts, "sum", device) if across_ranks else counts, bins)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bins) and np.array_equal(self._shift, other._shift)

    __hash__ = None  # type: ignore[assignment]

    def of_values(self, values: np.ndarray) -> np.ndarray:
        """(N,) float32, no -0 -> the number of each one's bin, ascending with the values, (N,) intp."""
        keys = _ordered(values)
        cells = _cells(keys)
        keys &= (1 << LOW_BITS) - 1
        keys >>= self._shift.take(cells, mode="clip")
        keys += self._first.take(cells, mode="clip")
        return keys.astype(np.intp)


def as_float32(values: np.ndarray) -> np.ndarray:
    """Flat, float32, +0 for -0; a copy."""
    return values.ravel().astype(np.float32, copy=False) + np.float32(0)


def reduced(values: np.ndarray, how: str, device: str) -> np.ndarray:
    """``values`` of all ranks together: their "sum", "min" or "max"."""
    import torch

    operation = {
        "sum": torch.distributed.ReduceOp.SUM,
        "min": torch.distributed.ReduceOp.MIN,
        "max": torch.distributed.ReduceOp.MAX,
    }
    tensor = torch.tensor(values, device=device)
    torch.distributed.all_reduce(tensor, operation[how])
    return tensor.cpu().numpy()


def _ordered(values: np.ndarray) -> np.ndarray:
    """float32 -> int32 in the same order."""
    bits = values.copy().view(np.int32)
    flip = bits >> 31
    flip &= 0x7FFFFFFF
    bits ^= flip
    return bits


def _cells(keys: np.ndarray) -> np.ndarray:
    cells = keys >> LOW_BITS
    cells += CELLS // 2
    return cells
