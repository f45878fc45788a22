"""What lies between the extractor and the flows: the pool, and an optional standardisation."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError

Pool = Literal["avg", "max", "none"]


def check_pool(name: str) -> Pool:
    """``name`` if it is a pool. Errors: InputError otherwise."""
    if name not in get_args(Pool):
        raise InputError(f"pool {name!r} is not known; choose one of {', '.join(get_args(Pool))}")
    return cast(Pool, name)


def pool_features(features: Sequence[Tensor], pool: Pool = "avg") -> list[Tensor]:
    """3x3, stride 2, padding 1 on each level; ``avg`` counts the padding in its mean; ``none`` hands them through."""
    if check_pool(pool) == "none":
        return list(features)
    operation = F.avg_pool2d if pool == "avg" else F.max_pool2d
    return [operation(level, kernel_size=3, stride=2, padding=1) for level in features]


class FeatureNormalizer(nn.Module):
    """(x - mean) / std per channel of each level, with the statistics of the training images.

    Not part of the published recipe: it puts channels of very different size on one scale, so that a flow trains in
    fewer epochs.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        for level, c in enumerate(channels):
            self.register_buffer(f"mean{level}", torch.zeros(c))
            self.register_buffer(f"std{level}", torch.ones(c))

    @property
    def fitted(self) -> bool:
        """Whether it has other statistics than a new one's, mean 0 and std 1."""
        return any(not torch.equal(b, torch.full_like(b, float("std" in name))) for name, b in self.named_buffers())

    def fit(self, levels: Iterable[Tensor]) -> None:
        """Takes the statistics of all training features: per level one (N, C_l, H_l, W_l)."""
        for i, level in enumerate(levels):
            moments = _Moments()
            moments.add(level)
            self._take(i, moments)

    def fit_batches(self, batches: Iterable[Sequence[Tensor]]) -> None:
        """The same of features that come batch by batch, (B, C_l, H_l, W_l) per level, and are not kept."""
        moments: dict[int, _Moments] = defaultdict(_Moments)
        for batch in batches:
            for i, level in enumerate(batch):
                moments[i].add(level)
        for i, of_level in moments.items():
            self._take(i, of_level)

    def _take(self, level: int, moments: "_Moments") -> None:
        self.get_buffer(f"mean{level}").copy_(moments.mean)
        self.get_buffer(f"std{level}").copy_((moments.square / moments.count).sqrt().clamp_min(1e-6))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [
            (level - self.get_buffer(f"mean{i}")[:, None, None]) / self.get_buffer(f"std{i}")[:, None, None]
            for i, level in enumerate(features)
        ]


class _Moments:
    """Mean and sum of squared deviations per channel over images, in one pass (Chan, Golub and LeVeque 1979).

    Image by image in float64: sums of squares would lose the variance of many equal values.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.square = torch.zeros(())

    @torch.no_grad()
    def add(self, level: Tensor) -> None:
        for image in level:
            values = image.double()
            mean = values.mean(dim=(1, 2))
            square = (values - mean[:, None, None]).square().mean(dim=(1, 2))
            self.count += 1
            off = mean - self.mean
            self.mean = self.mean + off / self.count
            self.square = self.square + square + off.square() * ((self.count - 1) / self.count)
