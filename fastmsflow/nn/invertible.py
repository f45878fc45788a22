"""Coupling blocks that keep their output alone: the backward pass computes the input from it, block by block."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backend import Backend
from ..errors import InputError
from .activation_checkpointing import Autocast, serving
from .coupling_block import CouplingBlock

# Blocks from one kept output to the next. Measured on 256 and 1024 channels, initial and 15 times larger log-scales:
# reconstructions of 4 blocks are off by 1e-7 and 8e-7 in float32, by up to 8e-5 and 2e-3 under bfloat16 autocast (of 8
# by 8e-5 and 7e-3), gradients there by 8e-4 and 2e-2, where bfloat16's own are off by 8e-3 and 1e-1 from float32's.
SEGMENT = 4
# Of each segment's input so many elements are kept, to see how far off its reconstruction is.
SAMPLE = 512
# By so much, relative in the norm: what bfloat16 rounds (2^-8) a few times over, above all that was measured.
LIMIT = 1e-2


def invertible(
    blocks: Sequence[CouplingBlock], x: Tensor, condition: Tensor, backend: Backend, order: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As ParallelFlow's forward, keeping the output of every SEGMENT blocks. x: float32 or float64.

    The backward pass inverts each block in x's dtype, whatever autocast says, and stops where a reconstruction is off
    by more than LIMIT. Errors: InputError there, and where x is of half precision.
    """
    if x.dtype.itemsize < 4:
        raise InputError(f"invertible recomputation needs features in float32, not {x.dtype}; use memory 'recompute'")
    autocast, backend = Autocast.here(x.device.type), serving(backend)
    log_dets = []
    for start in range(0, len(blocks), SEGMENT):
        part = blocks[start : start + SEGMENT]
        last = start + SEGMENT >= len(blocks)
        segment = _Segment(part, condition, backend, order if last else None, autocast)
        x, log_det = _Invertible.apply(segment, x, *segment.parameters())
        log_dets.append(log_det)
    return x, torch.stack(log_dets).sum(dim=0)


@dataclass(frozen=True)
class _Segment:
    blocks: Sequence[CouplingBlock]
    condition: Tensor
    backend: Backend
    order: Tensor | None
    """Of the last block's channels."""
    autocast: Autocast

    def parameters(self) -> list[Tensor]:
        return [parameter for block in self.blocks for parameter in block.parameters()]

    def order_of(self, block: CouplingBlock) -> Tensor | None:
        return self.order if block is self.blocks[-1] else None


class _Invertible(torch.autograd.Function):
    """``parameters``: the segment's, so that their gradients come out where autograd, and DDP, wait for them."""

    @staticmethod
    def forward(ctx: Any, segment: _Segment, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        ctx.segment = segment
        truth = x.detach()[_somewhere(x)]
        z, log_dets = x.detach(), []
        for block in segment.blocks:
            # Each block's graph is dropped at once. Without one, what is computed from weights alone would stay.
            with torch.enable_grad():
                z, log_det = block(z, segment.condition, segment.backend, segment.order_of(block))
            z = z.detach()
            log_dets.append(log_det.detach())
        ctx.save_for_backward(z, truth)
        return z, torch.stack(log_dets).sum(dim=0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        segment: _Segment = ctx.segment
        z, truth = ctx.saved_tensors
        state, grad, grads = z, grad_z, list[Tensor | None]()
        wanted = list(ctx.needs_input_grad[2:])
        for block in reversed(segment.blocks):
            with torch.enable_grad(), segment.autocast.again():
                x, driver, *results = block.recomputed(
                    state, segment.condition, segment.backend, segment.order_of(block)
                )
            parameters = list(block.parameters())
            needed, wanted = wanted[len(wanted) - len(parameters) :], wanted[: len(wanted) - len(parameters)]
            learning = [parameter for parameter, need in zip(parameters, needed, strict=True) if need]
            grad, grad_driver, *found = torch.autograd.grad(results, (x, driver, *learning), (grad, grad_log_det))
            grad[:, : block.kept] += grad_driver
            left = iter(found)
            grads[:0] = [next(left) if need else None for need in needed]
            state = x.detach()
        _check(truth, state[_somewhere(state)], z)
        return None, grad if ctx.needs_input_grad[1] else None, *grads


def _somewhere(x: Tensor) -> tuple[Tensor, ...]:
    """Indices of SAMPLE elements of x that are spread over all its dimensions: golden-section steps through it."""
    steps = torch.arange(min(SAMPLE, x.numel()), device=x.device)
    return torch.unravel_index(steps * (int(0.618 * x.numel()) | 1) % x.numel(), x.shape)


def _check(truth: Tensor, found: Tensor, z: Tensor) -> None:
    """Errors: InputError where ``found`` is too far off, though z is finite: a loss that is not has its own error."""
    error = (torch.linalg.vector_norm(found - truth) / torch.linalg.vector_norm(truth)).item()
    if not error <= LIMIT and z.isfinite().all():
        raise InputError(
            f"invertible recomputation: a block's input is off by {100 * error:.2g} %, more than {100 * LIMIT:g} %;"
            " train with memory 'recompute', which is exact"
        )
