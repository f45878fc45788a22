"""One step of a parallel flow: affine coupling, global affine, fixed channel permutation."""

import torch
from torch import Tensor, nn

from ..backend import Backend
from ..errors import InputError
from ..ops.conv3x3_coupling import conv3x3_coupling
from ..ops.coupling import coupling_inverse
from ..reference.coupling import ClampForm, initial_global_scale, invert_permutation, kept_channels
from .subnet import ConditionedSubnet


class CouplingBlock(nn.Module):
    """x1, x2 = halves of x; s, t = 0.1 subnet(x1, condition); z = permute(concat(x1, x2 exp(soft_clamp(s)) + t) g + o).

    Source: FrEIA's ``AllInOneBlock`` with SOFTPLUS global affine and a hard permutation (arXiv 2308.15300).
    """

    perm: Tensor
    inverse_perm: Tensor

    def __init__(self, channels: int, condition_channels: int, clamp: float, clamp_form: ClampForm) -> None:
        super().__init__()
        if channels <= 0 or channels % 2:
            raise InputError(f"channels must be even, not {channels}: a coupling splits them in halves")
        self.half = channels // 2
        self.clamp = clamp
        self.clamp_form: ClampForm = clamp_form
        self.global_scale = nn.Parameter(torch.full((channels,), initial_global_scale()))
        self.global_offset = nn.Parameter(torch.zeros(channels))
        self.register_buffer("perm", torch.randperm(channels))
        self.register_buffer("inverse_perm", invert_permutation(self.perm), persistent=False)
        self.register_load_state_dict_post_hook(CouplingBlock._invert)
        self.subnet = ConditionedSubnet(self.half, condition_channels, 2 * self.half)

    def forward(self, x: Tensor, condition: Tensor, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
        """x (B, C, H, W), condition (1 or B, D, H, W) -> z of x's shape and dtype, log_det (B,)."""
        hidden, head = self.subnet.hidden(x[:, : self.half], condition, backend), self.subnet.conv2
        perms = (self.perm, self.inverse_perm)
        return conv3x3_coupling(
            hidden, head.weight, head.bias, x, *self._affine, *perms, self.clamp, self.clamp_form, backend
        )

    def inverse(self, z: Tensor, condition: Tensor, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
        """z (B, C, H, W) -> x, and the log_det (B,) of this direction."""
        raw = self.subnet(kept_channels(z, *self._affine, self.inverse_perm, self.half), condition, backend)
        return coupling_inverse(z, raw, *self._affine, self.perm, self.clamp, self.clamp_form, backend)

    @property
    def _affine(self) -> tuple[Tensor, Tensor]:
        return self.global_scale, self.global_offset

    def _invert(self, *_: object) -> None:
        """A loaded permutation has another inverse."""
        self.inverse_perm = invert_permutation(self.perm)
