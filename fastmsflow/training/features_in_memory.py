"""Computes features once and holds them in memory: the extractor is frozen and training augments nothing."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..data.datasets import ImageFileDataset, Progress
from ..data.reader_pool import ReaderPool, batched, read_images
from ..distributed.process_group import ProcessGroup
from ..models.msflow import MSFlow


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
    """Features that lie in memory, (N, C_l, H_l, W_l) per level: those of every ``step``-th image."""

    def __init__(self, levels: Sequence[Tensor], step: int = 1) -> None:
        self.levels = levels
        self._step = step

    def fetch(self, numbers: list[int]) -> list[Tensor]:
        """Returns the features of some images by number: (B, C_l, H_l, W_l) per level, in channels-last memory."""
        rows = [number // self._step for number in numbers]
        return [level[rows].contiguous(memory_format=torch.channels_last) for level in self.levels]


def gather_features(own: Sequence[Tensor], images: int, world: ProcessGroup) -> list[Tensor]:
    """Gathers the features of all ``images`` images in each process.

    ``own``: per level, the features of every ``world.size``-th image from number ``world.rank`` on.
    """
    if world.size == 1:
        return list(own)
    most = -(-images // world.size)
    levels = []
    for level in own:
        _, c, h, w = level.shape
        by_rank = [torch.empty((most, h, w, c), dtype=level.dtype) for _ in range(world.size)]
        by_rank[world.rank][: len(level)] = level.permute(0, 2, 3, 1)
        torch.distributed.all_gather(by_rank, by_rank[world.rank].clone())
        levels.append(torch.stack(by_rank, dim=1).flatten(0, 1)[:images].permute(0, 3, 1, 2))
    return levels
