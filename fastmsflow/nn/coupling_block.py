"""One step of a parallel flow: affine coupling, global affine, fixed channel permutation."""

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..reference import coupling
from ..reference.coupling import ClampForm
from .subnet import ConditionedSubnet


class CouplingBlock(nn.Module):
    """x1, x2 = halves of x; s, t = 0.1 subnet(x1, condition); z = permute(concat(x1, x2 exp(soft_clamp(s)) + t) g + o).

    Source: FrEIA's ``AllInOneBlock`` with SOFTPLUS global affine and a hard permutation (arXiv 2308.15300).
    """

    perm: Tensor

    def __init__(self, channels: int, condition_channels: int, clamp: float, clamp_form: ClampForm) -> None:
        super().__init__()
        if channels <= 0 or channels % 2:
            raise InputError(f"channels must be even, not {channels}: a coupling splits them in halves")
        self.half = channels // 2
        self.clamp = clamp
        self.clamp_form: ClampForm = clamp_form
        self.global_scale = nn.Parameter(torch.full((channels,), coupling.initial_global_scale()))
        self.global_offset = nn.Parameter(torch.zeros(channels))
        self.register_buffer("perm", torch.randperm(channels))
        self.subnet = ConditionedSubnet(self.half, condition_channels, 2 * self.half)

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W), condition (1 or B, D, H, W) -> z of x's shape and dtype, log_det (B,)."""
        x1, x2 = x.chunk(2, dim=1)
        raw_s, t = self._scale_and_shift(x1, condition)
        y2, log_det = coupling.affine_forward(x2, raw_s, t, self.clamp, self.clamp_form)
        y, log_det_global = coupling.global_affine_forward(
            torch.cat((x1, y2), dim=1), self.global_scale, self.global_offset
        )
        return coupling.permute_channels(y, self.perm), log_det + log_det_global

    def inverse(self, z: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """z (B, C, H, W) -> x, and the log_det (B,) of this direction."""
        y = coupling.permute_channels(z, coupling.invert_permutation(self.perm))
        y, log_det_global = coupling.global_affine_inverse(y, self.global_scale, self.global_offset)
        x1, y2 = y.chunk(2, dim=1)
        raw_s, t = self._scale_and_shift(x1, condition)
        x2, log_det = coupling.affine_inverse(y2, raw_s, t, self.clamp, self.clamp_form)
        return torch.cat((x1, x2), dim=1), log_det + log_det_global

    def _scale_and_shift(self, x1: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        raw_s, t = (coupling.SUBNET_SCALE * self.subnet(x1, condition)).chunk(2, dim=1)
        return raw_s, t
