"""Divides real numbers into 65,536 bins, which are narrow where a sample is dense."""

import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..errors import InputError
from .defect_regions import Regions
from .input_checks import as_scores

BINS = 65_536
# A cell is a float32's sign, exponent and first 5 bits of the mantissa: 32 cells from a number to its double.
LOW_BITS = 18
CELLS = 1 << (32 - LOW_BITS)


class Bins:
    """Assigns every float32 to a bin.

    The bins are cells of 1/32 to 1/64 of their values' size, each halved as often as its share of a sample demands. One
    third of the bins follows the good pixels, one the defective ones, and one the defective ones weighted so that every
    region counts the same. If values crowd around another number than 0, closer than a thousandth of it, subtract that
    number from them.
    """

    def __init__(self, counts: np.ndarray, bins: int = BINS) -> None:
        """Chooses at most ``bins`` bins by ``counts`` (M, CELLS), the values of each of M kinds in each cell.

        A kind without values is left out. Raises: InputError if ``bins`` is less than twice CELLS.
        """
        if bins < 2 * CELLS:
            raise InputError(f"bins is {bins}; give at least {2 * CELLS}")
        totals = counts.sum(axis=1, keepdims=True)
        shares = (counts / np.where(totals > 0, totals, 1)).sum(axis=0) / max(1, np.count_nonzero(totals))
        halvings = np.log2(np.maximum(1, shares * (bins - CELLS))).astype(np.int32).clip(max=LOW_BITS)
        sizes = 1 << halvings.astype(np.int64)
        self.number = int(sizes.sum())
        """Number of bins."""
        self._shift = LOW_BITS - halvings
        self._first = (np.cumsum(sizes) - sizes).astype(np.int32)
        self.mark = zlib.crc32(halvings.tobytes())
        """A checksum, which almost surely differs if the bins differ."""

    @classmethod
    def from_sample(
        cls, masks: Any, maps: Any, *, bins: int = BINS, across_ranks: bool = False, device: str = "cpu"
    ) -> "Bins":
        """Chooses bins for values like those of a sample, ``maps`` (B, H, W) with ``masks``; see PixelHistogram.update.

        ``across_ranks``: the samples of all ranks are taken together, see PixelHistogram.all_reduce.
        """
        return cls.from_samples([(masks, maps)], bins=bins, across_ranks=across_ranks, device=device)

    @classmethod
    def from_samples(
        cls, samples: Iterable[tuple[Any, Any]], *, bins: int = BINS, across_ranks: bool = False, device: str = "cpu"
    ) -> "Bins":
        """Chooses bins as ``from_sample`` does, for several samples: masks and maps, each pair of a size of its own."""
        counts = sum((_counted(masks, maps) for masks, maps in samples), start=np.zeros((3, CELLS)))
        return cls(reduced(counts, "sum", device) if across_ranks else counts, bins)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bins) and np.array_equal(self._shift, other._shift)

    def of_values(self, values: np.ndarray) -> np.ndarray:
        """Returns the bin numbers (N,) intp of values (N,) float32 without -0; they ascend with the values."""
        keys = _ordered(values)
        cells = _cells(keys)
        keys &= (1 << LOW_BITS) - 1
        keys >>= self._shift.take(cells, mode="clip")
        keys += self._first.take(cells, mode="clip")
        return keys.astype(np.intp)


def _counted(masks: Any, maps: Any) -> np.ndarray:
    """Returns how many values lie in each cell, (3, CELLS): of good pixels, of defective ones, and these by weight."""
    regions = masks if isinstance(masks, Regions) else Regions(masks)
    counts = np.zeros((3, CELLS))
    for image, (at, weights) in zip(as_scores(maps, "maps", regions.shape), regions.pixels, strict=True):
        cells = _cells(_ordered(as_float32(image)))
        counts[0] += np.bincount(cells, minlength=CELLS)
        defective = np.bincount(cells[at], minlength=CELLS)
        counts[:2] += np.stack([-defective, defective])
        counts[2] += np.bincount(cells[at], weights, CELLS)
    return counts


def as_float32(values: np.ndarray) -> np.ndarray:
    """Returns a flat float32 copy with +0 in place of -0."""
    return values.ravel().astype(np.float32, copy=False) + np.float32(0)


def reduced(values: np.ndarray, how: str, device: str) -> np.ndarray:
    """Returns the "sum", "min" or "max" of ``values`` over all ranks."""
    import torch

    tensor = torch.tensor(values, device=device)
    torch.distributed.all_reduce(tensor, getattr(torch.distributed.ReduceOp, how.upper()))
    return tensor.cpu().numpy()


def _ordered(values: np.ndarray) -> np.ndarray:
    """Maps float32 to int32 in the same order."""
    bits = values.view(np.int32)
    return bits ^ (bits >> 31 & 0x7FFFFFFF)


def _cells(keys: np.ndarray) -> np.ndarray:
    return (keys >> LOW_BITS) + CELLS // 2
