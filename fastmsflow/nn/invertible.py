"""Coupling blocks of which only the output is stored: the backward pass computes the input from it, block by block."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backend import Backend
from ..errors import InputError
from .activation_checkpointing import current_backend
from .coupling_block import CouplingBlock

# Blocks from one stored output to the next. Measured on 256 and 1024 channels, initial and 15 times larger log-scales:
# reconstructions of 4 blocks are off by 1e-7 and 8e-7 in float32, by up to 8e-5 and 2e-3 under bfloat16 autocast (of 8
# by 8e-5 and 7e-3), gradients there by 8e-4 and 2e-2, where bfloat16's own are off by 8e-3 and 1e-1 from float32's.
SEGMENT = 4
# So many elements of each segment's input are stored, to see how far off its reconstruction is.
SAMPLE = 512
# The largest error, relative in the norm: a few times what bfloat16 rounds (2^-8), above all that was measured.
LIMIT = 1e-2


def invertible(
    blocks: Sequence[CouplingBlock],
    x: Tensor,
    condition: Tensor,
    *,
    backend: Backend,
    output_perm: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Computes ParallelFlow's forward and stores the output of every SEGMENT blocks. x: float32 or float64.

    The backward pass inverts each block in x's dtype, whatever autocast says.
    Raises: InputError if x is of half precision or, in the backward pass, a reconstruction is off by more than LIMIT.
    """
    if x.dtype.itemsize < 4:
        raise InputError(
            f"invertible recomputation needs features in float32, not {x.dtype}; use activation checkpointing"
            " 'recompute'"
        )
    device, backend = x.device.type, current_backend(backend)
    # The backward pass has no autocast of its own. A cache would hold weights in half precision beyond their block.
    autocast = torch.autocast(
        device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=False
    )
    perms = [output_perm if block is blocks[-1] else None for block in blocks]
    log_dets = []
    for start in range(0, len(blocks), SEGMENT):
        part = slice(start, start + SEGMENT)
        segment = _Segment(
            blocks=blocks[part], output_perms=perms[part], condition=condition, backend=backend, autocast=autocast
        )
        x, log_det = _Invertible.apply(segment, x, *(p for block in segment.blocks for p in block.parameters()))
        log_dets.append(log_det)
    return x, torch.stack(log_dets).sum(dim=0)


@dataclass(frozen=True, kw_only=True)
class _Segment:
    """Holds a few blocks and what they read besides x."""

    blocks: Sequence[CouplingBlock]
    output_perms: Sequence[Tensor | None]
    """A permutation of each block's output channels, or None."""
    condition: Tensor
    backend: Backend
    autocast: torch.autocast
    """The autocast of the forward pass."""


class _Invertible(torch.autograd.Function):
    """Runs a segment; ``parameters`` are its own, so that autograd, and DDP, receive their gradients."""

    @staticmethod
    def forward(ctx: Any, segment: _Segment, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        ctx.segment = segment
        sample = x.detach()[_sample_indices(x)]
        z, log_dets = x.detach(), []
        for block, output_perm in zip(segment.blocks, segment.output_perms, strict=True):
            # Each block's graph is dropped at once. Without one, what is computed from weights alone would stay.
            with torch.enable_grad():
                z, log_det = block(z, segment.condition, segment.backend, output_perm)
            z = z.detach()
            log_dets.append(log_det.detach())
        ctx.save_for_backward(z, sample)
        return z, torch.stack(log_dets).sum(dim=0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        segment: _Segment = ctx.segment
        z, sample = ctx.saved_tensors
        state, grad, grads = z, grad_z, list[Tensor | None]()
        for block, output_perm in zip(reversed(segment.blocks), reversed(segment.output_perms), strict=True):
            with torch.enable_grad(), segment.autocast:
                x, first_half, *outputs = block.recompute(state, segment.condition, segment.backend, output_perm)
            trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
            leaves = (x, first_half, *trained)
            grad, grad_first_half, *found = torch.autograd.grad(outputs, leaves, (grad, grad_log_det))
            grad[:, : block.half_channels] += grad_first_half
            remaining = iter(found)
            grads[:0] = [next(remaining) if parameter.requires_grad else None for parameter in block.parameters()]
            state = x.detach()
        _check_reconstruction(sample, state[_sample_indices(state)], z)
        return None, grad if ctx.needs_input_grad[1] else None, *grads


def _sample_indices(x: Tensor) -> tuple[Tensor, ...]:
    """Returns indices of SAMPLE elements of x that golden-section steps spread over all its dimensions."""
    steps = torch.arange(min(SAMPLE, x.numel()), device=x.device)
    return torch.unravel_index(steps * (int(0.618 * x.numel()) | 1) % x.numel(), x.shape)


def _check_reconstruction(expected: Tensor, found: Tensor, z: Tensor) -> None:
    """Checks reconstructed elements of x against the stored ones.

    Raises: InputError if they are too far off, though z is finite: a loss that is not finite has its own error.
    """
    error = (torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)).item()
    if not error <= LIMIT and z.isfinite().all():
        raise InputError(
            f"invertible recomputation: a block's input is off by {100 * error:.2g} %, more than {100 * LIMIT:g} %;"
            " train with activation checkpointing 'recompute', which is exact"
        )
