"""The flow of one level: coupling blocks one after the other."""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import cast

import torch
from torch import Tensor, nn

from ..backend import Backend
from ..reference.clamp_forms import ClampForm
from ..reference.coupling import add_log_dets
from ..reference.coupling_spec import CouplingResult
from .activation_checkpointing import ActivationCheckpointing, checkpointed
from .coupling_block import CouplingBlock
from .invertible import invertible


class ParallelFlow(nn.Module):
    """Transforms the features of one level, given a condition (arXiv 2308.15300).

    Raises: InputError if ``channels`` is odd.
    """

    def __init__(
        self, channels: int, condition_channels: int, blocks: int, *, clamp: float, clamp_form: ClampForm
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
        output_perm: Tensor | None = None,
        *,
        activation_checkpointing: ActivationCheckpointing | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Computes z, of the shape of x, and log_det (B,).

        x (B, C, H, W); condition (1 or B, D, H, W). ``output_perm``: another permutation of z's channels, for what
        comes next; the last block's store applies it. ``activation_checkpointing``: how memory is saved if gradients
        are taken.
        """
        (z,), log_det = self.couple(
            x, condition, backend, output_perm, activation_checkpointing=activation_checkpointing, result="concat"
        )
        return z, cast(Tensor, log_det)

    def couple(
        self,
        x: Tensor,
        condition: Tensor,
        backend: Backend = "auto",
        output_perm: Tensor | None = None,
        *,
        activation_checkpointing: ActivationCheckpointing | None = None,
        result: CouplingResult = "halves",
        with_log_det: bool = True,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Computes ``forward``, with z as its halves, (B, C / 2, H, W) each, or as [z] if ``result`` is "concat".

        log_det is None if not wanted.
        """
        blocks = cast("Sequence[CouplingBlock]", self.blocks)
        mode = activation_checkpointing if torch.is_grad_enabled() else None
        if mode == "invertible":
            z, log_det = invertible(blocks, x, condition, backend=backend, output_perm=output_perm)
            return list(z.chunk(2, dim=1)) if result == "halves" else [z], log_det
        state: Sequence[Tensor] = x.chunk(2, dim=1)
        log_dets: list[Tensor | None] = []
        for block in blocks:
            is_last = block is blocks[-1]
            couple: Callable[..., tuple[list[Tensor], Tensor | None]] = partial(
                block.couple,
                output_perm=output_perm if is_last else None,
                result=result if is_last else "halves",
                with_log_det=with_log_det,
            )
            if mode == "recompute":
                couple = partial(checkpointed, couple)
            state, block_log_det = couple(state, condition, backend=backend)
            log_dets.append(block_log_det)
        return list(state), add_log_dets(log_dets)

    def inverse(
        self, z: Tensor, condition: Tensor, backend: Backend = "auto", output_perm: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Computes x and the log_det (B,) of this direction from z, which ``output_perm`` has permuted."""
        log_dets = []
        for block in reversed(cast("Sequence[CouplingBlock]", self.blocks)):
            z, log_det = block.inverse(z, condition, backend, output_perm if block is self.blocks[-1] else None)
            log_dets.append(log_det)
        return z, reduce(torch.add, log_dets)
