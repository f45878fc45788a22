"""Features are computed once and kept: the extractor is frozen and training augments nothing."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from ..data import ImageDataset, LooseImages
from ..model import MSFlow
from ..world import World

Progress = Callable[[int], None]
Images = ImageDataset | LooseImages


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


class KeptFeatures:
    """Features in memory, (N, C_l, H_l, W_l) per level."""

    def __init__(self, levels: Sequence[Tensor]) -> None:
        self.levels = levels

    def fetch(self, numbers: list[int]) -> list[Tensor]:
        """(B, C_l, H_l, W_l) per level, in channels-last memory."""
        return [level[numbers].contiguous(memory_format=torch.channels_last) for level in self.levels]


def features_of_all(own: Sequence[Tensor], images: int, world: World) -> list[Tensor]:
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
