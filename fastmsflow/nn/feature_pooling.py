"""Pools the extractor's features and, optionally, normalizes them before the flows."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed.process_group import SINGLE_PROCESS, ProcessGroup
from ..errors import InputError

Pool = Literal["avg", "max", "none"]


def check_pool(name: str) -> Pool:
    """Returns ``name``.

    Raises: InputError if no pool has this name.
    """
    if name not in get_args(Pool):
        raise InputError(f"pool {name!r} is not known; choose one of {', '.join(get_args(Pool))}")
    return cast(Pool, name)


def pool_features(features: Sequence[Tensor], pool: Pool = "avg") -> list[Tensor]:
    """Pools each level (B, C_l, H_l, W_l) by 3x3, stride 2, padding 1.

    ``avg`` counts the padding in its mean; ``none`` returns the features as they are.
    Raises: InputError if no pool has the name ``pool``.
    """
    if check_pool(pool) == "none":
        return list(features)
    operation = F.avg_pool2d if pool == "avg" else F.max_pool2d
    return [operation(level, kernel_size=3, stride=2, padding=1) for level in features]


class FeatureNormalizer(nn.Module):
    """Computes (x - mean) / std per channel of each level, with the statistics of the training images.

    This is not part of the published recipe: it puts channels of very different size on one scale, so that a flow
    trains in fewer epochs.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        for level, c in enumerate(channels):
            self.register_buffer(f"mean{level}", torch.zeros(c))
            self.register_buffer(f"std{level}", torch.ones(c))

    @property
    def fitted(self) -> bool:
        """True if the statistics are not a new module's, mean 0 and std 1."""
        return any(not torch.equal(b, torch.full_like(b, float("std" in name))) for name, b in self.named_buffers())

    def fit(self, levels: Iterable[Tensor]) -> None:
        """Fits the statistics to all training features, one (N, C_l, H_l, W_l) per level."""
        self.fit_batches([list(levels)])

    def fit_batches(self, batches: Iterable[Sequence[Tensor]], world: ProcessGroup = SINGLE_PROCESS) -> None:
        """Fits the statistics to features that come in batches, (B, C_l, H_l, W_l) per level, and are not stored.

        Each process of ``world`` gives its share of the images, and all get the statistics of all of them.
        """
        own: dict[int, _RunningStatistics] = defaultdict(_RunningStatistics)
        for batch in batches:
            for i, level in enumerate(batch):
                own[i].add_images(level)
        merged: dict[int, _RunningStatistics] = defaultdict(_RunningStatistics)
        for share in world.all_gather(own):
            for i, found in share.items():
                merged[i].add(found.count, found.mean, found.square)
        for i, found in merged.items():
            self.get_buffer(f"mean{i}").copy_(found.mean)
            self.get_buffer(f"std{i}").copy_((found.square / found.count).sqrt().clamp_min(1e-6))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Normalizes features (B, C_l, H_l, W_l) per level."""
        return [
            (level - self.get_buffer(f"mean{i}")[:, None, None]) / self.get_buffer(f"std{i}")[:, None, None]
            for i, level in enumerate(features)
        ]


class _RunningStatistics:
    """Computes mean and sum of squared deviations per channel in one pass over images.

    Source: Chan, Golub and LeVeque 1979. The update is image by image in float64: sums of squares would lose the
    variance of many equal values.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.square = torch.zeros(())

    @torch.no_grad()
    def add_images(self, level: Tensor) -> None:
        """Adds the images of level (B, C, H, W)."""
        for image in level:
            values = image.double()
            mean = values.mean(dim=(1, 2))
            self.add(1, mean, (values - mean[:, None, None]).square().mean(dim=(1, 2)))

    def add(self, count: int, mean: Tensor, square: Tensor) -> None:
        """Adds ``count`` images of this mean (C,) and mean squared deviations (C,), the latter summed over images."""
        before, self.count = self.count, self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * count / self.count
        self.square = self.square + square + delta.square() * (before * count / self.count)
