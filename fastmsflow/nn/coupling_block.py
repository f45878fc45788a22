"""One step of a parallel flow: affine coupling, global affine, fixed channel permutation."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..backend import Backend
from ..errors import InputError
from ..ops.conv3x3_coupling import conv3x3_coupling
from ..ops.coupling import coupling, coupling_inverse
from ..reference.coupling import ClampForm, initial_global_scale, invert_permutation, kept_channels
from .subnets import ConditionedSubnet
from .weight_cache import WeightCache, wide


class CouplingBlock(nn.Module):
    """x1, x2 = halves of x; s, t = 0.1 subnet(x1, condition); z = permute(concat(x1, x2 exp(soft_clamp(s)) + t) g + o).

    Source: FrEIA's ``AllInOneBlock`` with SOFTPLUS global affine and a hard permutation (arXiv 2308.15300).
    """

    kept: int
    clamp: float
    global_scale: nn.Parameter
    global_offset: nn.Parameter
    perm: Tensor
    inverse_perm: Tensor
    subnet: ConditionedSubnet

    def __init__(self, channels: int, condition_channels: int, clamp: float, clamp_form: ClampForm) -> None:
        super().__init__()
        if channels <= 0 or channels % 2:
            raise InputError(f"channels must be even, not {channels}: a coupling splits them in halves")
        self.kept = channels // 2
        self.clamp = clamp
        self.clamp_form: ClampForm = clamp_form
        self.global_scale = nn.Parameter(torch.full((channels,), initial_global_scale()))
        self.global_offset = nn.Parameter(torch.zeros(channels))
        self.register_buffer("perm", torch.randperm(channels))
        self.register_buffer("inverse_perm", invert_permutation(self.perm), persistent=False)
        self.register_load_state_dict_post_hook(CouplingBlock._invert)
        self.subnet = ConditionedSubnet(self.kept, condition_channels, 2 * self.kept)
        self._ordered: WeightCache[tuple[Tensor, Tensor]] = WeightCache()
        self._wide: WeightCache[list[Tensor]] = WeightCache()

    def forward(
        self, x: Tensor, condition: Tensor, backend: Backend = "auto", order: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W), condition (1 or B, D, H, W) -> z of x's shape and dtype, log_det (B,).

        ``order``: a permutation of z's channels that is applied in the same store.
        """
        (z,), log_det = self.couple(x.chunk(2, dim=1), condition, backend, order, whole=True)
        return z, cast(Tensor, log_det)

    def couple(
        self,
        x: Sequence[Tensor],
        condition: Tensor,
        backend: Backend = "auto",
        order: Tensor | None = None,
        *,
        whole: bool = False,
        with_log_det: bool = True,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Computes ``forward`` from halves (B, C / 2, H, W) to halves, which the next block takes as they are.

        ``whole``: z comes as [z]. ``with_log_det``: without it log_det is None.
        """
        x1, x2 = x
        hidden, (weight, bias) = self.subnet.hidden(x1, condition, backend), self.subnet.head()
        fixed = (*self._affine, *self._perms(order), self.clamp, self.clamp_form)
        return conv3x3_coupling(hidden, weight, bias, x1, x2, *fixed, with_log_det, whole, backend)

    def inverse(
        self, z: Tensor, condition: Tensor, backend: Backend = "auto", order: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """z (B, C, H, W), in ``order`` -> x, and the log_det (B,) of this direction."""
        perms = self._perms(order)
        raw = self.subnet(kept_channels(z, *self._affine, perms[1], self.kept), condition, backend)
        return coupling_inverse(z, raw, *self._affine, *perms, self.clamp, self.clamp_form, backend)

    def recomputed(
        self, z: Tensor, condition: Tensor, backend: Backend = "auto", order: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For a backward pass that has only z (B, C, H, W), in ``order``: x, and its first half once more, both leaves
        of the graph that leads from them to z and log_det (B,); the subnet runs once. Needs gradients enabled."""
        fixed = (*self._affine, *self._perms(order), self.clamp, self.clamp_form)
        with torch.no_grad():
            driver = kept_channels(z, *self._affine, self._perms(order)[1], self.kept)
        raw = self.subnet(driver.requires_grad_(), condition, backend)
        with torch.no_grad():
            x, _ = coupling_inverse(z, raw.detach(), *fixed, backend)
        x1, x2 = x.requires_grad_().chunk(2, dim=1)
        (z,), log_det = coupling(x1, x2, raw, None, *fixed, whole=True, backend=backend)
        return x, driver, z, cast(Tensor, log_det)

    def _perms(self, order: Tensor | None) -> tuple[Tensor, Tensor]:
        """perm and its inverse; followed by ``order``."""
        if order is None:
            return self.perm, self.inverse_perm
        return self._ordered.get(lambda: _with_inverse(self.perm[order]), (self.perm, order))

    @property
    def _affine(self) -> tuple[Tensor, Tensor]:
        scale, offset = wide(self._wide, self.global_scale, self.global_offset)
        return scale, offset

    def train(self, mode: bool = True) -> "CouplingBlock":
        self._wide.clear()
        return super().train(mode)

    def _invert(self, *_: object) -> None:
        """A loaded permutation has another inverse."""
        self.inverse_perm = invert_permutation(self.perm)


def _with_inverse(perm: Tensor) -> tuple[Tensor, Tensor]:
    return perm, invert_permutation(perm)
