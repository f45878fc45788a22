"""Computes features once and holds them in memory: the extractor is frozen and training augments nothing."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..data.datasets import ImageFileDataset, Progress
from ..data.reader_pool import ReaderPool, batched, read_images
from ..distributed.process_group import ProcessGroup
from ..models.msflow import MSFlow
from ..nn.feature_pooling import FeatureNormalizer


def pooled_features(
    model: MSFlow,
    images: ImageFileDataset,
    numbers: Sequence[int],
    readers: ReaderPool | None = None,
    *,
    progress: Progress = lambda done: None,
) -> list[Tensor]:
    """Computes pooled features of the images of ``numbers``, before any standardization; see ``pooled_of_batches``."""
    batches = read_images(images, batched(numbers), readers, next(model.parameters()).device)
    return pooled_of_batches(model, batches, len(numbers), progress=progress)


def pooled_of_batches(
    model: MSFlow,
    batches: Iterable[Tensor],
    count: int,
    *,
    dtype: torch.dtype | None = None,
    progress: Progress = lambda done: None,
) -> list[Tensor]:
    """Computes pooled features of ``batches`` of ``count`` images on the model's device, before any standardization.

    Returns (N, C_l, H_l, W_l) per level, on the CPU, in channels-last memory, in ``dtype`` or by default the model's.
    ``progress`` is called with the number of images done so far.
    """
    features: list[Tensor] = []
    done = 0
    for pixels in batches:
        levels = model.pooled(pixels, fused=True)
        if not features:
            features = [
                torch.empty((count, *level.shape[1:]), dtype=dtype or level.dtype, memory_format=torch.channels_last)
                for level in levels
            ]
        for store, level in zip(features, levels, strict=True):
            store[done : done + len(level)] = level
        done += len(pixels)
        progress(done)
    return features


class FeaturesInMemory:
    """Features that lie in memory, (N, C_l, H_l, W_l) per level.

    ``numbers``: the numbers, ascending, of the images or tiles whose features these are; None: from 0 on.
    """

    def __init__(self, levels: Sequence[Tensor], numbers: Sequence[int] | None = None) -> None:
        self.levels = levels
        self._numbers = None if numbers is None else np.asarray(numbers, np.int64)

    def fetch(self, numbers: list[int]) -> list[Tensor]:
        """Returns the features of some images by number: (B, C_l, H_l, W_l) per level, in channels-last memory."""
        rows = numbers if self._numbers is None else np.searchsorted(self._numbers, numbers).tolist()
        return [level[rows].contiguous(memory_format=torch.channels_last) for level in self.levels]


def block_of(rank: int, images: int, world: ProcessGroup) -> range:
    """Returns the numbers of the images whose features a process computes for all of ``world``.

    They are in a row, so that the tiles of an image, which is read once, are mostly those of one process.
    """
    return range(images * rank // world.size, images * (rank + 1) // world.size)


def gather_features(own: Sequence[Tensor], images: int, world: ProcessGroup) -> list[Tensor]:
    """Gathers the features of all ``images`` images in each process.

    ``own``: per level, the features of this process's ``block_of`` the images.
    """
    if world.size == 1:
        return list(own)
    counts = [len(block_of(rank, images, world)) for rank in range(world.size)]
    levels = []
    for level in own:
        _, c, h, w = level.shape
        gathered = torch.empty((world.size * max(counts), h, w, c), dtype=level.dtype)
        blocks = list(gathered.split(max(counts)))
        blocks[world.rank][: len(level)] = level.permute(0, 2, 3, 1)
        torch.distributed.all_gather(blocks, blocks[world.rank].clone())
        start = 0
        for block, count in zip(blocks, counts, strict=True):
            # In place: there may be no memory for all of them twice.
            gathered[start : start + count] = block[:count].clone()
            start += count
        levels.append(gathered[:images].permute(0, 3, 1, 2))
    return levels


def standardize_in_place(levels: Sequence[Tensor], standardizer: FeatureNormalizer) -> None:
    """Standardizes features (N, C_l, H_l, W_l) per level, a few at once: all of them twice may not fit in memory."""
    for numbers in batched(range(len(levels[0]))):
        rows = slice(numbers[0], numbers[-1] + 1)
        for level, standardized in zip(levels, standardizer([level[rows] for level in levels]), strict=True):
            level[rows] = standardized
