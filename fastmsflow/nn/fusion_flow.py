"""The fusion flow: one coupling across the levels."""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import cast

import torch
from torch import Tensor, nn

from ..backend import Backend
from ..ops.conv3x3 import conv3x3
from ..ops.conv3x3_coupling import conv3x3_coupling
from ..ops.coupling import coupling_inverse
from ..reference.coupling import add_log_dets
from ..reference.coupling_spec import CouplingResult, CouplingSpec, Halves
from .activation_checkpointing import ActivationCheckpointing, checkpointed
from .streams import run_on_streams
from .subnets import FusionSubnet


class FusionFlow(nn.Module):
    """Couples the halves of all levels with each other (arXiv 2308.15300).

    The levels come as halves, permuted by the buffer ``perm{l}`` each: the parallel flows' last store does both.
    """

    def __init__(self, channels: Sequence[int], clamp: float) -> None:
        super().__init__()
        self.clamp = clamp
        for level, c in enumerate(channels):
            self.register_buffer(f"perm{level}", torch.randperm(c))
        halves = [c // 2 for c in channels]
        self.subnet_1 = FusionSubnet(halves)
        self.subnet_2 = FusionSubnet(halves)

    @property
    def input_perms(self) -> list[Tensor]:
        """The permutation of channels in which each level comes, int64 (C_l,)."""
        return [self.get_buffer(f"perm{level}") for level in range(len(self.subnet_1.conv_s))]

    def forward(self, x: Sequence[Tensor], backend: Backend = "auto") -> tuple[list[Tensor], Tensor]:
        """Computes z and log_det (B,) from permuted levels x (B, C_l, H_l, W_l), of which z has the shapes."""
        z, log_det = self.couple([level.chunk(2, dim=1) for level in x], backend, result="concat")
        return z, cast(Tensor, log_det)

    def couple(
        self,
        x: Sequence[Sequence[Tensor]],
        backend: Backend = "auto",
        *,
        result: CouplingResult,
        activation_checkpointing: ActivationCheckpointing | None = None,
        with_log_det: bool = True,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Couples the first halves of the permuted levels by the second, then the second by the first.

        ``x``: both halves of each level's channels, (B, C_l / 2, H_l, W_l) each.
        ``result``: "concat" for z, (B, C_l, H_l, W_l) per level, or "likelihood" for -0.5 mean over channels of z^2,
        (B, H_l, W_l) per level: the kernels then never write z. log_det (B,) is None if not wanted.
        ``activation_checkpointing``: if given, only the inputs of the two couplings are stored for the backward pass.
        """
        first, second = zip(*x, strict=True)
        couple: Callable[..., tuple[list[Tensor], Tensor | None]] = self._couple_by_subnet
        if activation_checkpointing is not None and torch.is_grad_enabled():
            couple = partial(checkpointed, couple)
        inner = CouplingSpec.fusion(self.clamp, with_log_det=with_log_det)
        outer = CouplingSpec.fusion(self.clamp, bounded=True, result=result, with_log_det=with_log_det)
        first_alone = [(None, half) for half in first]
        coupled, log_det_2 = couple(inner, self.subnet_2, second, first_alone, backend=backend)
        both = list(zip(coupled, second, strict=True))
        z, log_det_1 = couple(outer, self.subnet_1, coupled, both, backend=backend)
        return z, add_log_dets([log_det_1, log_det_2])

    def _couple_by_subnet(
        self,
        spec: CouplingSpec,
        subnet: FusionSubnet,
        subnet_input: Sequence[Tensor],
        x: Sequence[Halves],
        *,
        backend: Backend,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Couples each level's halves x by what ``subnet`` makes of ``subnet_input``."""
        levels = zip(subnet(subnet_input, backend), subnet.heads(), x, strict=True)
        tasks = [
            partial(conv3x3_coupling, hidden, *head, halves, spec=spec, backend=backend)
            for hidden, head, halves in levels
        ]
        results, log_dets = zip(*run_on_streams(tasks, subnet_input[0].device), strict=True)
        return [z for (z,) in results], add_log_dets(log_dets)

    def inverse(self, z: Sequence[Tensor], backend: Backend = "auto") -> tuple[list[Tensor], Tensor]:
        """Computes the permuted levels x from z, and the log_det (B,) of this direction.

        This undoes what the bound of +-1e6 left untouched.
        """
        y1, y2 = zip(*(level.chunk(2, dim=1) for level in z), strict=True)
        h2, log_det_1 = self._invert_by_subnet(y2, y1, self.subnet_1, backend)
        h1, log_det_2 = self._invert_by_subnet(y1, h2, self.subnet_2, backend)
        return [torch.cat(pair, dim=1) for pair in zip(h1, h2, strict=True)], log_det_1 + log_det_2

    def _invert_by_subnet(
        self, y: Sequence[Tensor], subnet_input: Sequence[Tensor], subnet: FusionSubnet, backend: Backend
    ) -> tuple[list[Tensor], Tensor]:
        levels = zip(subnet(subnet_input, backend), subnet.heads(), strict=True)
        raws = (conv3x3(hidden, *head, backend) for hidden, head in levels)
        spec = CouplingSpec.fusion(self.clamp)
        pairs = zip(y, raws, strict=True)
        h, log_dets = zip(*(coupling_inverse(*pair, spec=spec, backend=backend) for pair in pairs), strict=True)
        return list(h), reduce(torch.add, log_dets)
