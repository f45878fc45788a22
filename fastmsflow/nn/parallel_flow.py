"""The flow of one level: coupling blocks one after the other."""

from functools import partial, reduce

import torch
from torch import Tensor, nn

from ..backend import Backend
from ..reference.coupling import ClampForm
from ..reference.dtypes import accumulation_dtype
from .coupling_block import CouplingBlock
from .invertible import invertible
from .lists import all_of
from .low_memory import Memory, recomputed


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
        memory: Memory | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W), condition (1 or B, D, H, W) -> z of x's shape, log_det (B,).

        ``order``: a permutation of z's channels, for what comes next; the last block's store applies it.
        ``memory``: how it is saved where gradients are taken.
        """
        if memory is not None and torch.is_grad_enabled():
            return self._forward_in_low_memory(x, condition, backend, order, memory)
        log_det = torch.zeros(x.shape[0], dtype=accumulation_dtype(x.dtype), device=x.device)
        for block in self.blocks:
            x, block_log_det = block(x, condition, backend, order if block is self.blocks[-1] else None)
            log_det = log_det + block_log_det
        return x, log_det

    def _forward_in_low_memory(
        self, x: Tensor, condition: Tensor, backend: Backend, order: Tensor | None, memory: Memory
    ) -> tuple[Tensor, Tensor]:
        blocks = all_of(CouplingBlock, self.blocks)
        if memory == "invertible":
            return invertible(blocks, x, condition, backend, order)
        log_dets = []
        for block in blocks:
            run = partial(block, order=order if block is blocks[-1] else None)
            x, log_det = recomputed(run, x, condition, backend=backend)
            log_dets.append(log_det)
        return x, reduce(torch.add, log_dets)

    def inverse(
        self, z: Tensor, condition: Tensor, backend: Backend = "auto", order: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """z, in ``order`` -> x, and the log_det (B,) of this direction."""
        log_det = torch.zeros(z.shape[0], dtype=accumulation_dtype(z.dtype), device=z.device)
        for block in reversed(all_of(CouplingBlock, self.blocks)):
            z, block_log_det = block.inverse(z, condition, backend, order if block is self.blocks[-1] else None)
            log_det = log_det + block_log_det
        return z, log_det
