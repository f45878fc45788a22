"""One step of a parallel flow: affine coupling, global affine, fixed channel permutation."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..backend import Backend
from ..errors import InputError
from ..ops.conv3x3_coupling import conv3x3_coupling
from ..ops.coupling import coupling, coupling_inverse
from ..reference.clamp_forms import ClampForm
from ..reference.coupling import initial_global_scale, invert_first_half, invert_permutation
from ..reference.coupling_spec import CouplingResult, CouplingSpec, GlobalAffine
from .subnets import ConditionedSubnet
from .weight_cache import WeightCache, wide


class CouplingBlock(nn.Module):
    """x1, x2 = halves of x; s, t = 0.1 subnet(x1, condition); z = permute(concat(x1, x2 exp(soft_clamp(s)) + t) g + o).

    Source: FrEIA's ``AllInOneBlock`` with SOFTPLUS global affine and a hard permutation (arXiv 2308.15300).
    Raises: InputError if ``channels`` is odd.
    """

    perm: Tensor
    inverse_perm: Tensor

    def __init__(self, channels: int, condition_channels: int, clamp: float, clamp_form: ClampForm) -> None:
        super().__init__()
        if channels <= 0 or channels % 2:
            raise InputError(f"channels must be even, not {channels}: a coupling splits them in halves")
        self.half_channels = channels // 2
        self.clamp = clamp
        self.clamp_form: ClampForm = clamp_form
        self.global_scale = nn.Parameter(torch.full((channels,), initial_global_scale()))
        self.global_offset = nn.Parameter(torch.zeros(channels))
        self.register_buffer("perm", torch.randperm(channels))
        self.register_buffer("inverse_perm", invert_permutation(self.perm), persistent=False)
        self.register_load_state_dict_post_hook(CouplingBlock._invert)
        self.subnet = ConditionedSubnet(self.half_channels, condition_channels, 2 * self.half_channels)
        self._combined_perms: WeightCache[tuple[Tensor, Tensor]] = WeightCache()
        self._wide: WeightCache[list[Tensor]] = WeightCache()

    def forward(
        self, x: Tensor, condition: Tensor, backend: Backend = "auto", output_perm: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Computes z, of the shape and dtype of x, and log_det (B,).

        x (B, C, H, W); condition (1 or B, D, H, W). ``output_perm``: another permutation of z's channels, which is
        applied in the same store.
        """
        (z,), log_det = self.couple(x.chunk(2, dim=1), condition, backend, output_perm, result="concat")
        return z, cast(Tensor, log_det)

    def couple(
        self,
        x: Sequence[Tensor],
        condition: Tensor,
        backend: Backend = "auto",
        output_perm: Tensor | None = None,
        *,
        result: CouplingResult = "halves",
        with_log_det: bool = True,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Computes ``forward`` from halves (B, C / 2, H, W) to halves, which the next block takes as they are.

        ``result``: "concat" for z as one tensor. Without ``with_log_det`` None is returned in its place.
        """
        x1, x2 = x
        hidden, (weight, bias) = self.subnet.hidden(x1, condition, backend), self.subnet.head()
        spec = self._spec(result, with_log_det)
        affine = self._affine_and_perm(output_perm)
        return conv3x3_coupling(hidden, weight, bias, (x1, x2), spec=spec, affine=affine, backend=backend)

    def inverse(
        self, z: Tensor, condition: Tensor, backend: Backend = "auto", output_perm: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Computes x and the log_det (B,) of this direction from z (B, C, H, W), which ``output_perm`` has permuted."""
        affine = self._affine_and_perm(output_perm)
        raw = self.subnet(invert_first_half(z, affine), condition, backend)
        return coupling_inverse(z, raw, spec=self._spec("concat"), affine=affine, backend=backend)

    def recompute(
        self, z: Tensor, condition: Tensor, backend: Backend = "auto", output_perm: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Computes x from z (B, C, H, W) and, in a graph for the backward pass, z and log_det (B,) again.

        Returns x, its first half (B, C / 2, H, W) once more, as the subnet read it, z and log_det: the first two are
        the graph's leaves. The subnet runs once. Gradients have to be enabled.
        """
        spec, affine = self._spec("concat"), self._affine_and_perm(output_perm)
        with torch.no_grad():
            first_half = invert_first_half(z, affine)
        raw = self.subnet(first_half.requires_grad_(), condition, backend)
        with torch.no_grad():
            x, _ = coupling_inverse(z, raw.detach(), spec=spec, affine=affine, backend=backend)
        x1, x2 = x.requires_grad_().chunk(2, dim=1)
        (z,), log_det = coupling((x1, x2), raw, spec=spec, affine=affine, backend=backend)
        return x, first_half, z, cast(Tensor, log_det)

    def _spec(self, result: CouplingResult, with_log_det: bool = True) -> CouplingSpec:
        return CouplingSpec(clamp=self.clamp, form=self.clamp_form, result=result, with_log_det=with_log_det)

    def _affine_and_perm(self, output_perm: Tensor | None) -> GlobalAffine:
        (scale, offset), (perm, inverse_perm) = self._affine, self._perms(output_perm)
        return GlobalAffine(scale=scale, offset=offset, perm=perm, inverse_perm=inverse_perm)

    def _perms(self, output_perm: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns perm, followed by ``output_perm`` if given, and the inverse."""
        if output_perm is None:
            return self.perm, self.inverse_perm

        def combine() -> tuple[Tensor, Tensor]:
            perm = self.perm[output_perm]
            return perm, invert_permutation(perm)

        return self._combined_perms.get(combine, (self.perm, output_perm))

    @property
    def _affine(self) -> tuple[Tensor, Tensor]:
        scale, offset = wide(self._wide, self.global_scale, self.global_offset)
        return scale, offset

    def train(self, mode: bool = True) -> "CouplingBlock":
        """Sets the mode, as any module's, and drops cached values."""
        self._wide.clear()
        return super().train(mode)

    def _invert(self, *_: object) -> None:
        """Inverts the permutation again after another one was loaded."""
        self.inverse_perm = invert_permutation(self.perm)
