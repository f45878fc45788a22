"""The fusion flow: one coupling across the levels."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..reference import coupling
from ..reference.fusion import clamp_output
from .subnet import FusionSubnet


class FusionFlow(nn.Module):
    """Permutes each level's channels, then couples the halves of all levels with each other (arXiv 2308.15300)."""

    def __init__(self, channels: Sequence[int], clamp: float) -> None:
        super().__init__()
        self.clamp = clamp
        for level, c in enumerate(channels):
            self.register_buffer(f"perm{level}", torch.randperm(c))
        halves = [c // 2 for c in channels]
        self.subnet_1 = FusionSubnet(halves)
        self.subnet_2 = FusionSubnet(halves)

    def forward(self, x: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """x (B, C_l, H_l, W_l) per level -> z of the same shapes, log_det (B,)."""
        permuted = [coupling.permute_channels(level, self.get_buffer(f"perm{i}")) for i, level in enumerate(x)]
        h1, h2 = zip(*(level.chunk(2, dim=1) for level in permuted), strict=True)
        y1, log_det_2 = self._couple(coupling.affine_forward, h1, self.subnet_2(h2))
        y2, log_det_1 = self._couple(coupling.affine_forward, h2, self.subnet_1(y1))
        z = [clamp_output(torch.cat(pair, dim=1)) for pair in zip(y1, y2, strict=True)]
        return z, log_det_1 + log_det_2

    def inverse(self, z: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """z -> x, and the log_det (B,) of this direction. Undoes what the clamp to +-1e6 left untouched."""
        y1, y2 = zip(*(level.chunk(2, dim=1) for level in z), strict=True)
        h2, log_det_1 = self._couple(coupling.affine_inverse, y2, self.subnet_1(y1))
        h1, log_det_2 = self._couple(coupling.affine_inverse, y1, self.subnet_2(h2))
        x = [
            coupling.permute_channels(torch.cat(pair, dim=1), coupling.invert_permutation(self.get_buffer(f"perm{i}")))
            for i, pair in enumerate(zip(h1, h2, strict=True))
        ]
        return x, log_det_1 + log_det_2

    def _couple(self, affine, halves, scales_and_shifts) -> tuple[list[Tensor], Tensor]:
        levels, log_dets = zip(
            *(affine(h, s, t, self.clamp, "atan") for h, (s, t) in zip(halves, scales_and_shifts, strict=True)),
            strict=True,
        )
        return list(levels), sum(log_dets)
