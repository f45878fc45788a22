"""Features are computed once and kept: the extractor is frozen and training augments nothing."""

from collections.abc import Callable, Sequence, Sized
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, Sampler, SequentialSampler, Subset

from ..data import ImageDataset, LooseImages
from ..model import MSFlow

Progress = Callable[[int], None]
Images = ImageDataset | LooseImages
# Features per level, (B, C_l, H_l, W_l), and the images' numbers.
Batch = tuple[list[Tensor], list[int]]
# Kept in memory, per level (N, C_l, H_l, W_l), or a set that has __getitems__.
Features = Sequence[Tensor] | Dataset[Batch]
T = TypeVar("T")


def pooled_features(
    model: MSFlow,
    images: Images | Subset[dict[str, Any]],
    batch_size: int = 16,
    workers: int = 0,
    progress: Progress = lambda done: None,
) -> list[Tensor]:
    """Pooled features of all ``images``, before any standardisation: (N, C_l, H_l, W_l) per level, on the CPU, in
    channels-last memory. ``progress`` is called with the number of images done so far."""
    device = next(model.parameters()).device
    kept: list[Tensor] = []
    done = 0
    for batch in DataLoader(images, batch_size, num_workers=workers):
        levels = model.pooled(batch["image"].to(device, memory_format=torch.channels_last))
        if not kept:
            kept = [
                torch.empty((len(images), *level.shape[1:]), dtype=level.dtype, memory_format=torch.channels_last)
                for level in levels
            ]
        for store, level in zip(kept, levels, strict=True):
            store[done : done + len(level)] = level
        done += len(levels[0])
        progress(done)
    return kept


class FeatureDataset(Dataset[Batch]):
    """A whole batch at once."""

    def __init__(self, levels: Sequence[Tensor]) -> None:
        self.levels = levels

    def __len__(self) -> int:
        return len(self.levels[0])

    def __getitems__(self, indices: list[int]) -> Batch:
        return [level[indices].contiguous(memory_format=torch.channels_last) for level in self.levels], indices


def feature_loader(
    features: Features,
    batch_size: int,
    shuffle_seed: int | None = None,
    loader: type[DataLoader[Batch]] = DataLoader,
) -> DataLoader[Batch]:
    """Batches of kept features, in order or, from ``shuffle_seed`` and the epoch alone, shuffled."""
    dataset = features if isinstance(features, Dataset) else FeatureDataset(features)
    if shuffle_seed is None:
        sampler: Sampler[int] = SequentialSampler(cast(Sized, dataset))
    else:
        # Of one replica: its order depends on nothing that a resumed run does not know.
        sampler = cast(Sampler[int], DistributedSampler(dataset, num_replicas=1, rank=0, seed=shuffle_seed))
    batches = BatchSampler(sampler, batch_size, drop_last=False)
    return loader(dataset, batch_sampler=batches, collate_fn=_as_it_is)


def _as_it_is(batch: T) -> T:
    return batch
