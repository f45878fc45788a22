"""The fusion flow: one coupling across the levels."""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import cast

import torch
from torch import Tensor, nn

from ..backend import Backend
from ..ops.conv3x3 import conv3x3
from ..ops.conv3x3_coupling import (
    conv3x3_fusion_coupling,
    conv3x3_fusion_coupling_concat,
    conv3x3_fusion_coupling_concat_likelihood,
)
from ..ops.coupling import fusion_coupling_inverse
from ..reference.coupling import add_log_dets
from .activation_checkpointing import ActivationCheckpointing, checkpointed
from .streams import run_on_streams
from .subnets import FusionSubnet

# Hidden maps, the head's weight and bias, a level's parts, the clamp, whether the log_det is wanted and the backend ->
# what becomes of the level, and its log_det.
Couple = Callable[..., tuple[Tensor, Tensor | None]]
# Both halves of each level's channels.
Levels = Sequence[Sequence[Tensor]]


class FusionFlow(nn.Module):
    """Couples the halves of all levels with each other (arXiv 2308.15300).

    The levels come as halves, permuted by the buffer ``perm{l}`` each: the parallel flows' last store does both.
    """

    clamp: float
    subnet_1: FusionSubnet
    subnet_2: FusionSubnet

    def __init__(self, channels: Sequence[int], clamp: float) -> None:
        super().__init__()
        self.clamp = clamp
        for level, c in enumerate(channels):
            self.register_buffer(f"perm{level}", torch.randperm(c))
        halves = [c // 2 for c in channels]
        self.subnet_1 = FusionSubnet(halves)
        self.subnet_2 = FusionSubnet(halves)

    @property
    def orders(self) -> list[Tensor]:
        """The permutation of channels in which each level comes."""
        return [self.get_buffer(f"perm{level}") for level in range(len(self.subnet_1.conv_s))]

    def forward(self, x: Sequence[Tensor], backend: Backend = "auto") -> tuple[list[Tensor], Tensor]:
        """x (B, C_l, H_l, W_l) per level, permuted -> z of the same shapes, log_det (B,)."""
        return self.latents([level.chunk(2, dim=1) for level in x], backend)

    def latents(
        self, x: Levels, backend: Backend = "auto", memory: ActivationCheckpointing | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Computes z per level, (B, C_l, H_l, W_l), and log_det (B,) from halves (B, C_l / 2, H_l, W_l) of x, permuted.

        ``memory``: if given, of each of the two couplings only the inputs are kept where gradients are taken.
        """
        z, log_det = self._couple(x, conv3x3_fusion_coupling_concat, backend, memory, True)
        return z, cast(Tensor, log_det)

    def log_likelihood_maps(
        self,
        x: Levels,
        backend: Backend = "auto",
        memory: ActivationCheckpointing | None = None,
        with_log_det: bool = True,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Computes what ``latents`` does, but for z -0.5 mean over channels of z^2, (B, H_l, W_l); z is not kept.

        log_det is None where it is not wanted.
        """
        return self._couple(x, conv3x3_fusion_coupling_concat_likelihood, backend, memory, with_log_det)

    def _couple(
        self, x: Levels, join: Couple, backend: Backend, memory: ActivationCheckpointing | None, with_log_det: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        """``join``: the coupling of the second halves, which yields what is returned per level."""
        h1, h2 = zip(*x, strict=True)
        drive: Callable[..., tuple[list[Tensor], Tensor | None]] = self._drive
        if memory is not None and torch.is_grad_enabled():
            drive = partial(checkpointed, drive)
        y1, log_det_2 = drive(conv3x3_fusion_coupling, self.subnet_2, h2, [h1], with_log_det, backend=backend)
        joined, log_det_1 = drive(join, self.subnet_1, y1, [y1, h2], with_log_det, backend=backend)
        return joined, add_log_dets([log_det_1, log_det_2])

    def _drive(
        self,
        couple: Couple,
        subnet: FusionSubnet,
        driver: Sequence[Tensor],
        parts: Sequence[Sequence[Tensor]],
        with_log_det: bool,
        backend: Backend,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Couples each level's ``parts`` by what ``subnet`` makes of ``driver``."""
        hidden = subnet(driver, backend)
        tasks = [
            partial(couple, *level, self.clamp, with_log_det, backend)
            for level in zip(hidden, *zip(*subnet.heads(), strict=True), *parts, strict=True)
        ]
        y, log_dets = zip(*run_on_streams(tasks, driver[0].device), strict=True)
        return list(y), add_log_dets(log_dets)

    def inverse(self, z: Sequence[Tensor], backend: Backend = "auto") -> tuple[list[Tensor], Tensor]:
        """z -> x, permuted, and the log_det (B,) of this direction. Undoes what the clamp to +-1e6 left untouched."""
        y1, y2 = zip(*(level.chunk(2, dim=1) for level in z), strict=True)
        h2, log_det_1 = self._undo(y2, y1, self.subnet_1, backend)
        h1, log_det_2 = self._undo(y1, h2, self.subnet_2, backend)
        return [torch.cat(pair, dim=1) for pair in zip(h1, h2, strict=True)], log_det_1 + log_det_2

    def _undo(
        self, y: Sequence[Tensor], driver: Sequence[Tensor], subnet: FusionSubnet, backend: Backend
    ) -> tuple[list[Tensor], Tensor]:
        levels = zip(subnet(driver, backend), subnet.heads(), strict=True)
        raws = (conv3x3(hidden, *head, backend) for hidden, head in levels)
        pairs = zip(y, raws, strict=True)
        h, log_dets = zip(*(fusion_coupling_inverse(*pair, self.clamp, backend) for pair in pairs), strict=True)
        return list(h), reduce(torch.add, log_dets)
