"""Builds what a user would run instead: the flows of the reference algorithm, written from its description on FrEIA
0.2's blocks, as its users run it; and our own plain PyTorch, compiled.

Modules and parameters are named as in official checkpoints, so those load with ``load_state_dict``.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from FrEIA.framework import SequenceINN
from FrEIA.modules import AllInOneBlock
from torch import Tensor, nn

from fastmsflow import MultiScaleFlow
from fastmsflow.compat.state_dict_keys import official_fusion, official_parallel
from fastmsflow.nn.positional_encoding import positional_encoding_2d
from fastmsflow.reference.coupling import clamp_output


class FreiaSubnet(nn.Module):
    """The subnet of a level."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inputs, 3, padding=1)
        self.ln = nn.LayerNorm(inputs)
        self.conv2 = nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln(self.conv1(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.conv2(normed.relu())


def freia_flow(channels: int, condition: int, blocks: int, grid: tuple[int, int], clamp: float = 1.9) -> SequenceINN:
    """A parallel flow of FrEIA 0.2's own modules."""
    flow = SequenceINN(channels, *grid)
    for _ in range(blocks):
        flow.append(
            AllInOneBlock,
            cond=0,
            cond_shape=(condition, *grid),
            subnet_constructor=FreiaSubnet,
            affine_clamping=clamp,
            global_affine_type="SOFTPLUS",
        )
    return flow


class Permutation(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        perm = torch.randperm(channels)
        self.register_buffer("perm", perm)
        self.register_buffer("perm_inv", perm.argsort())

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.perm]


class CrossConvolutions(nn.Module):
    """F of the fusion flow, up to the convolutions of s and t."""

    def __init__(self, total: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(total, total // 4, 3, padding=1)
        self.norm = nn.LayerNorm(total // 4)
        self.conv2 = nn.Conv2d(total // 4, total, 3, padding=1)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        pooled = torch.cat([F.adaptive_avg_pool2d(level, maps[-1].shape[2:]) for level in maps], dim=1)
        normed = self.norm(self.conv1(pooled).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        joint = self.conv2(normed.relu()).relu().split([level.shape[1] for level in maps], dim=1)
        return [
            F.interpolate(part, size=level.shape[2:], mode="bilinear", align_corners=True) + level
            for part, level in zip(joint, maps, strict=True)
        ]


class CrossSubnet(nn.Module):
    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.cross_convs = CrossConvolutions(sum(channels))
        self.conv_s = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for c in channels)
        self.conv_t = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for c in channels)

    def forward(self, maps: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        mixed = self.cross_convs(maps)
        return [(s(level), t(level)) for s, t, level in zip(self.conv_s, self.conv_t, mixed, strict=True)]


class CrossCoupling(nn.Module):
    def __init__(self, channels: Sequence[int], clamp: float) -> None:
        super().__init__()
        self.clamp = clamp
        self.subnet_1 = CrossSubnet([c // 2 for c in channels])
        self.subnet_2 = CrossSubnet([c // 2 for c in channels])

    def forward(self, x: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        h1, h2 = zip(*(level.split(level.shape[1] // 2, dim=1) for level in x), strict=True)
        y1, first = self._couple(h1, self.subnet_2(h2))
        y2, second = self._couple(h2, self.subnet_1(y1))
        return [clamp_output(torch.cat(pair, dim=1)) for pair in zip(y1, y2, strict=True)], first + second

    def _couple(self, h: Sequence[Tensor], st: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], Tensor | float]:
        y, log_det = [], 0.0
        for level, (s, t) in zip(h, st, strict=True):
            e = self.clamp * 0.636 * torch.atan(s / self.clamp)
            y.append(level * torch.exp(e) + t)
            log_det = log_det + e.sum(dim=(1, 2, 3))
        return y, log_det


class FreiaFusion(nn.Module):
    def __init__(self, channels: Sequence[int], clamp: float) -> None:
        super().__init__()
        self.module_list = nn.ModuleList([*(Permutation(c) for c in channels), CrossCoupling(channels, clamp)])

    def forward(self, x: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        *permutations, coupling = self.module_list
        return coupling([permutation(level) for permutation, level in zip(permutations, x, strict=True)])


class FreiaMSFlow(nn.Module):
    """The reference algorithm's flows with the weights of ``flow``: eager, channels-first, dense permutations, the
    condition an input of every convolution. That it is computed once, not once a batch, is a present to the peer."""

    def __init__(self, flow: MultiScaleFlow, grids: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        for level, (d, grid) in enumerate(zip(flow.condition_channels, grids, strict=True)):
            encoding = positional_encoding_2d(d, *grid, dtype=torch.float32, device="cpu")
            self.register_buffer(f"condition{level}", encoding)
        self.parallel_flows = nn.ModuleList(
            freia_flow(c, d, n, grid, flow.clamp)
            for c, d, n, grid in zip(flow.channels, flow.condition_channels, flow.blocks, grids, strict=True)
        )
        self.fusion_flow = FreiaFusion(flow.channels, flow.clamp)
        # The modules above stand in the levels' order and have dense permutations, whatever file the flow is from.
        as_built = copy.copy(flow)
        as_built.official_layout = None
        for level, parallel in enumerate(self.parallel_flows):
            parallel.load_state_dict(official_parallel(as_built, level))
        self.fusion_flow.load_state_dict(official_fusion(as_built))

    def forward(self, x: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        levels, log_dets = zip(
            *(
                flow(level, [self.get_buffer(f"condition{i}").expand(len(level), -1, -1, -1)])
                for i, (flow, level) in enumerate(zip(self.parallel_flows, x, strict=True))
            ),
            strict=True,
        )
        z, log_det = self.fusion_flow(levels)
        return z, log_det + sum(log_dets)

    def nll(self, x: Sequence[Tensor]) -> Tensor:
        z, log_det = self(x)
        return 0.5 * sum(level.square().sum(dim=(1, 2, 3)) for level in z) - log_det
