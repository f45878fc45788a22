"""Reads features out of a cache: chooses where they lie during a run, and copies them to the GPU."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..available_memory import available_memory
from ..data.reader_pool import batched
from ..models.msflow import MSFlow
from .feature_cache import FeatureCache

Place = Literal["on the GPU", "in memory", "on disk"]
# The share of the free memory that features may take; the rest is for the training itself.
MEMORY_SHARE = 0.5


def placement(needed: int, device: torch.device, processes: int = 1) -> Place:
    """Returns where ``needed`` bytes of features lie best for a model on ``device``: on its GPU or in memory if they
    take at most half of what is free there, else on disk. ``processes``: the number of processes on this machine that
    each hold as many features."""
    if device.type == "cuda" and needed <= MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]:
        return "on the GPU"
    return "in memory" if needed * processes <= MEMORY_SHARE * available_memory() else "on disk"


class FeaturesOnDisk:
    """Features out of a cache, on ``model``'s device, in its flow's dtype and standardized by it.

    ``rows``: the rows of the cache, (N,). ``place``: where the features lie until they are fetched, in the cache's
    dtype.
    """

    def __init__(self, cache: FeatureCache, rows: np.ndarray, model: MSFlow, place: Place) -> None:
        self._cache = cache
        self._rows = rows
        self._model = model
        self._levels: list[Tensor] | None = None
        if place != "on disk":
            device = self.device if place == "on the GPU" else torch.device("cpu")
            levels = [torch.empty((len(rows), *shape), dtype=cache.dtype, device=device) for shape in cache.shapes]
            for numbers in batched(range(len(rows))):
                for level, features in zip(levels, cache.take(rows[numbers]), strict=True):
                    level[numbers[0] : numbers[-1] + 1] = features.permute(0, 2, 3, 1)
            self._levels = levels

    @property
    def device(self) -> torch.device:
        """The model's device; a trainer may move the model."""
        return next(self._model.flow.parameters()).device

    def __len__(self) -> int:
        return len(self._rows)

    def fetch(self, numbers: list[int]) -> list[Tensor]:
        """Returns the features of some images by number: (B, C_l, H_l, W_l) per level."""
        levels = [level.to(self._model.flow.dtype) for level in self._on_device(self.stored(numbers))]
        return levels if self._model.standardiser is None else self._model.standardiser(levels)

    def stored(self, indices: Sequence[int]) -> list[Tensor]:
        """Returns features as they lie: (B, C_l, H_l, W_l) per level, channels last, in the cache's dtype."""
        if self._levels is None:
            return self._cache.take(self._rows[indices])
        index = torch.tensor(indices, device=self._levels[0].device)
        return [level.index_select(0, index).permute(0, 3, 1, 2) for level in self._levels]

    def _on_device(self, levels: list[Tensor]) -> list[Tensor]:
        device = self.device
        if device.type != "cuda" or levels[0].is_cuda:
            return levels
        return [level.pin_memory().to(device, non_blocking=True) for level in levels]
