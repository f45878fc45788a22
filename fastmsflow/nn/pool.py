"""What lies between the extractor and the flows: the pool, and an optional standardisation."""

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


class Standardiser(nn.Module):
    """(x - mean) / std per channel of each level, with the statistics of the training images.

    Not part of the published recipe: it puts channels of very different size on one scale, so that a flow trains in
    fewer epochs.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        for level, c in enumerate(channels):
            self.register_buffer(f"mean{level}", torch.zeros(c))
            self.register_buffer(f"std{level}", torch.ones(c))

    @torch.no_grad()
    def fit(self, levels: Iterable[Tensor]) -> None:
        """Takes the statistics of all training features: per level one (N, C_l, H_l, W_l)."""
        for i, level in enumerate(levels):
            # Image by image in float64: a variance of many equal values must not come out negative.
            mean = torch.stack([image.double().mean(dim=(1, 2)) for image in level]).mean(dim=0)
            square = torch.stack([(image.double() - mean[:, None, None]).square().mean(dim=(1, 2)) for image in level])
            self.get_buffer(f"mean{i}").copy_(mean)
            self.get_buffer(f"std{i}").copy_(square.mean(dim=0).sqrt().clamp_min(1e-6))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [
            (level - self.get_buffer(f"mean{i}")[:, None, None]) / self.get_buffer(f"std{i}")[:, None, None]
            for i, level in enumerate(features)
        ]
