"""Features are computed once and kept: the extractor is frozen and training augments nothing."""

from bisect import bisect
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ..data import ImageDataset, ImageFileDataset
from ..data.datasets import ToRead
from ..data.reader_pool import ReaderPool
from ..distributed.process_group import ProcessGroup
from ..models.msflow import MSFlow

Progress = Callable[[int], None]
Images = ImageDataset | ImageFileDataset
BATCH = 16


class ConcatImages:
    """The images of all ``parts``, one part behind the other."""

    def __init__(self, parts: Iterable[Images]) -> None:
        self._parts = list(parts)
        self._ends = list(accumulate(map(len, self._parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def to_read(self, index: int) -> ToRead:
        """See ImageFileDataset."""
        part = bisect(self._ends, index)
        return self._parts[part].to_read(index - (self._ends[part - 1] if part else 0))


def pooled_features(
    model: MSFlow,
    images: Images | ConcatImages,
    numbers: Sequence[int],
    readers: ReaderPool,
    progress: Progress = lambda done: None,
) -> list[Tensor]:
    """Pooled features of the images of ``numbers``, before any standardisation: (N, C_l, H_l, W_l) per level, on the
    CPU, in channels-last memory. ``progress`` is called with the number of images done so far."""
    device = next(model.parameters()).device
    kept: list[Tensor] = []
    done = 0
    batches = (numbers[start : start + BATCH] for start in range(0, len(numbers), BATCH))
    for batch in readers.read([images.to_read(number) for number in batch] for batch in batches):
        levels = model.pooled(batch["image"].to(device, memory_format=torch.channels_last))
        if not kept:
            kept = [
                torch.empty((len(numbers), *level.shape[1:]), dtype=level.dtype, memory_format=torch.channels_last)
                for level in levels
            ]
        for store, level in zip(kept, levels, strict=True):
            store[done : done + len(level)] = level
        done += len(levels[0])
        progress(done)
    return kept


class FeaturesInMemory:
    """Features in memory, (N, C_l, H_l, W_l) per level."""

    def __init__(self, levels: Sequence[Tensor]) -> None:
        self.levels = levels

    def fetch(self, numbers: list[int]) -> list[Tensor]:
        """(B, C_l, H_l, W_l) per level, in channels-last memory."""
        return [level[numbers].contiguous(memory_format=torch.channels_last) for level in self.levels]


def features_of_all(own: Sequence[Tensor], images: int, world: ProcessGroup) -> list[Tensor]:
    """From what each process computed of every ``world.size``-th image, from its rank on: all, on each of them."""
    if world.size == 1:
        return list(own)
    most = -(-images // world.size)
    levels = []
    for level in own:
        _, c, h, w = level.shape
        parts = [torch.empty((most, h, w, c), dtype=level.dtype) for _ in range(world.size)]
        parts[world.rank][: len(level)] = level.permute(0, 2, 3, 1)
        torch.distributed.all_gather(parts, parts[world.rank].clone())
        whole = torch.empty((images, h, w, c), dtype=level.dtype)
        for rank, part in enumerate(parts):
            whole[rank :: world.size] = part[: len(range(rank, images, world.size))]
        levels.append(whole.permute(0, 3, 1, 2))
    return levels
