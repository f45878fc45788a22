"""The flow of one level: coupling blocks one after the other."""

import torch
from torch import Tensor, nn

from ..backend import Backend
from ..reference.coupling import ClampForm
from ..reference.dtypes import accumulation_dtype
from .coupling_block import CouplingBlock
from .lists import all_of


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
        self, x: Tensor, condition: Tensor, backend: Backend = "auto", order: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W), condition (1 or B, D, H, W) -> z of x's shape, log_det (B,).

        ``order``: a permutation of z's channels, for what comes next; the last block's store applies it.
        """
        log_det = torch.zeros(x.shape[0], dtype=accumulation_dtype(x.dtype), device=x.device)
        for block in self.blocks:
            x, block_log_det = block(x, condition, backend, order if block is self.blocks[-1] else None)
            log_det = log_det + block_log_det
        return x, log_det

    def inverse(
        self, z: Tensor, condition: Tensor, backend: Backend = "auto", order: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """z, in ``order`` -> x, and the log_det (B,) of this direction."""
        log_det = torch.zeros(z.shape[0], dtype=accumulation_dtype(z.dtype), device=z.device)
        for block in reversed(all_of(CouplingBlock, self.blocks)):
            z, block_log_det = block.inverse(z, condition, backend, order if block is self.blocks[-1] else None)
            log_det = log_det + block_log_det
        return z, log_det
