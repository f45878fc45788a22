"""The flow of one level: coupling blocks one after the other."""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import cast

import torch
from torch import Tensor, nn

from ..backend import Backend
from ..reference.coupling import ClampForm, add_log_dets
from .activation_checkpointing import ActivationCheckpointing, checkpointed
from .coupling_block import CouplingBlock
from .invertible import invertible
from .module_lists import all_of


class ParallelFlow(nn.Module):
    blocks: nn.ModuleList

    def __init__(
        self, channels: int, condition_channels: int, blocks: int, clamp: float, clamp_form: ClampForm
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            CouplingBlock(channels, condition_channels, clamp, clamp_form) for _ in range(blocks)
        )

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        backend: Backend = "auto",
        order: Tensor | None = None,
        memory: ActivationCheckpointing | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W), condition (1 or B, D, H, W) -> z of x's shape, log_det (B,).

        ``order``: a permutation of z's channels, for what comes next; the last block's store applies it.
        ``memory``: how it is saved where gradients are taken.
        """
        (z,), log_det = self._couple(x, condition, backend, order, memory=memory, whole=True)
        return z, cast(Tensor, log_det)

    def halves(
        self,
        x: Tensor,
        condition: Tensor,
        backend: Backend = "auto",
        order: Tensor | None = None,
        *,
        memory: ActivationCheckpointing | None = None,
        with_log_det: bool = True,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Computes ``forward`` and returns z as its halves, (B, C / 2, H, W) each; log_det is None where it is not
        wanted."""
        z, log_det = self._couple(x, condition, backend, order, memory=memory, with_log_det=with_log_det)
        return z if len(z) == 2 else list(z[0].chunk(2, dim=1)), log_det

    def _couple(
        self,
        x: Tensor,
        condition: Tensor,
        backend: Backend,
        order: Tensor | None,
        *,
        memory: ActivationCheckpointing | None,
        whole: bool = False,
        with_log_det: bool = True,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Returns [z] where ``whole``, elsewhere its halves; inverted blocks return [z] in any case."""
        blocks = all_of(CouplingBlock, self.blocks)
        saving = memory if torch.is_grad_enabled() else None
        if saving == "invertible":
            z, log_det = invertible(blocks, x, condition, backend, order)
            return [z], log_det
        parts: Sequence[Tensor] = x.chunk(2, dim=1)
        log_dets: list[Tensor | None] = []
        for block in blocks:
            last = block is blocks[-1]
            run: Callable[..., tuple[list[Tensor], Tensor | None]] = partial(
                block.couple, order=order if last else None, whole=whole and last, with_log_det=with_log_det
            )
            if saving == "recompute":
                run = partial(checkpointed, run)
            parts, block_log_det = run(parts, condition, backend=backend)
            log_dets.append(block_log_det)
        return list(parts), add_log_dets(log_dets)

    def inverse(
        self, z: Tensor, condition: Tensor, backend: Backend = "auto", order: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """z, in ``order`` -> x, and the log_det (B,) of this direction."""
        log_dets = []
        for block in reversed(all_of(CouplingBlock, self.blocks)):
            z, log_det = block.inverse(z, condition, backend, order if block is self.blocks[-1] else None)
            log_dets.append(log_det)
        return z, reduce(torch.add, log_dets)
