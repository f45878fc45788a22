"""The two networks that predict log-scales and shifts: within a level, and across the levels."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..backend import Backend
from ..cpu.convolution import forget
from ..ops.conv3x3 import conv3x3
from ..ops.conv3x3_layer_norm import conv3x3_layer_norm_relu
from ..ops.fusion import conv3x3_split_and_upsample, pool_and_concat
from ..ops.layer_norm import layer_norm_relu
from ..reference.dtypes import accumulation_dtype
from ..reference.layer_norm import LAYER_NORM_EPS
from .weight_cache import WeightCache, wide


def weight_and_bias(convolution: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Returns both; all convolutions of these networks have a bias."""
    return convolution.weight, cast(Tensor, convolution.bias)


class ConditionedSubnet(nn.Module):
    """Computes conv 3x3, LayerNorm, ReLU, conv 3x3 of concat(x, condition); the hidden width is the inputs' width.

    The first convolution is linear, so the condition's share of it is a map of its own, computed once and added: once a
    call in training, once for given weights if no gradient is taken (not once an image). A condition of B images has a
    map for each, computed in every call.
    """

    def __init__(self, in_channels: int, condition_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        width = in_channels + condition_channels
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.conv2 = nn.Conv2d(width, out_channels, 3, padding=1)
        self._first: WeightCache[tuple[Tensor, Tensor]] = WeightCache()
        self._condition_map: WeightCache[Tensor] = WeightCache()
        self._wide: WeightCache[list[Tensor]] = WeightCache()

    def forward(self, x: Tensor, condition: Tensor, backend: Backend = "auto") -> Tensor:
        """Maps x (B, in_channels, H, W) and condition (1 or B, condition_channels, H, W) to (B, out_channels, H, W)."""
        return conv3x3(self.hidden(x, condition, backend), self.conv2.weight, self.conv2.bias, backend)

    def hidden(self, x: Tensor, condition: Tensor, backend: Backend = "auto") -> Tensor:
        """Computes what the second convolution takes, (B, width, H, W)."""
        norm = (self.norm.weight, self.norm.bias)
        weight, condition_weight = self._first_convolution()
        bias = weight_and_bias(self.conv1)[1]

        def compute() -> Tensor:
            return conv3x3(condition, condition_weight, bias, backend)

        if condition.shape[0] == 1:
            condition_map = self._condition_map.get(compute, (self.conv1.weight, bias, condition))
            return conv3x3_layer_norm_relu(x, weight, norm, condition_map, backend=backend)
        return layer_norm_relu(conv3x3(x, weight, None, backend) + compute(), *norm, backend=backend)

    def head(self) -> tuple[Tensor, Tensor]:
        """Returns the second convolution's weight and, in float32 or better, its bias."""
        weight, bias = weight_and_bias(self.conv2)
        return weight, wide(self._wide, bias)[0]

    def _first_convolution(self) -> tuple[Tensor, Tensor]:
        """Returns x's share of the weight, and the condition's."""
        weight = self.conv1.weight

        def split() -> tuple[Tensor, Tensor]:
            # A convolution would copy a slice that is not contiguous in every call.
            channels_last = weight.is_contiguous(memory_format=torch.channels_last)
            layout = torch.channels_last if channels_last else torch.contiguous_format
            shares = weight.split([self.in_channels, weight.shape[1] - self.in_channels], dim=1)
            x_weight, condition_weight = (share.contiguous(memory_format=layout) for share in shares)
            return x_weight, condition_weight

        return self._first.get(split, (weight,))

    def train(self, mode: bool = True) -> "ConditionedSubnet":
        """Sets the mode, as any module's, and drops cached values."""
        self._first.clear()
        self._condition_map.clear()
        self._wide.clear()
        forget(self.conv1.weight, self.conv2.weight)
        return super().train(mode)


class FusionSubnet(nn.Module):
    """Pools the levels to the last one's grid, mixes them and spreads the result back to the levels.

    Each level's head, a convolution, then predicts log-scales and shifts.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        total = sum(channels)
        self.conv1 = nn.Conv2d(total, total // 4, 3, padding=1)
        self.norm = nn.LayerNorm(total // 4, eps=LAYER_NORM_EPS)
        self.conv2 = nn.Conv2d(total // 4, total, 3, padding=1)
        self.conv_s = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for c in channels)
        self.conv_t = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for c in channels)
        self._heads: WeightCache[list[tuple[Tensor, Tensor]]] = WeightCache()

    def forward(self, maps: Sequence[Tensor], backend: Backend = "auto") -> list[Tensor]:
        """Computes per level what its head takes, of the shape of the level's map (B, C_l, H_l, W_l)."""
        pooled = pool_and_concat(maps, backend)
        weight, bias = weight_and_bias(self.conv1)
        norm = (self.norm.weight, self.norm.bias)
        joint = conv3x3_layer_norm_relu(pooled, weight, norm, bias[None, :, None, None], backend=backend)
        return conv3x3_split_and_upsample(joint, *weight_and_bias(self.conv2), maps, backend=backend)

    def heads(self) -> list[tuple[Tensor, Tensor]]:
        """Returns per level weight and bias, in float32 or better, of the convolution to log-scales, then shifts."""
        convolutions = (cast("Sequence[nn.Conv2d]", convs) for convs in (self.conv_s, self.conv_t))
        pairs = [(weight_and_bias(s), weight_and_bias(t)) for s, t in zip(*convolutions, strict=True)]
        sources = [parameter for pair in pairs for head in pair for parameter in head]
        wider = accumulation_dtype(sources[0].dtype)
        return self._heads.get(
            lambda: [(torch.cat((s[0], t[0])), torch.cat((s[1], t[1])).to(wider)) for s, t in pairs], sources
        )

    def train(self, mode: bool = True) -> "FusionSubnet":
        """Sets the mode, as any module's, and drops cached values."""
        self._heads.clear()
        forget(self.conv1.weight, self.conv2.weight)
        return super().train(mode)
