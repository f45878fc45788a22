"""The flows: pooled features -> log-likelihood maps and log-det; a training step."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.contestants import Contestant
from benchmarks.interleaved import Entry, TimeRow
from benchmarks.parity_gate import Reference, flow_gate, step_gate
from benchmarks.suite_settings import DEVICE, Size, rotated
from fastmsflow.benchmarking import CONDITION


def features(size: Size, batch: int) -> list[Tensor]:
    """The same for every contestant."""
    generator = torch.Generator().manual_seed(batch)
    shapes = ((batch, c, *grid) for c, grid in zip(size.channels, size.grids, strict=True))
    return [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]


def random_features(adapt: Callable[[Tensor], Tensor], size: Size, batch: int) -> list[Tensor]:
    return [
        adapt(torch.randn(batch, c, *grid, device=DEVICE)) for c, grid in zip(size.channels, size.grids, strict=True)
    ]


@pytest.mark.benchmark(group="flow inference")
def test_flow_inference(benchmark, time_row: TimeRow, size: Size, batch: int, reference: Reference) -> None:
    def enter(contestant: Contestant) -> Entry:
        return Entry(
            precision=contestant.precision,
            gate=flow_gate(contestant, reference, features(size, batch)),
            call=contestant.likelihoods,
            inputs=rotated(lambda: random_features(contestant.adapt, size, batch)),
        )

    benchmark.extra_info |= {"images": batch, "flops": batch * flops(size)}
    time_row(enter)


@pytest.mark.benchmark(group="flow training step")
def test_flow_training_step(benchmark, time_row: TimeRow, size: Size, reference: Reference) -> None:
    """Measures a step on features computed before, as this library's training does."""
    batch = size.training_batch

    def enter(contestant: Contestant) -> Entry:
        return Entry(
            precision=contestant.training_precision,
            gate=step_gate(contestant, reference, features(size, batch)),
            call=contestant.step,
            inputs=rotated(lambda: random_features(contestant.adapt_training, size, batch)),
        )

    benchmark.extra_info |= {"images": batch, "flops": 3 * batch * flops(size)}
    time_row(enter)


def flops(size: Size) -> int:
    """Counts one image's forward pass, the condition's share of the first convolutions and permutations not counted."""
    total = 0
    for c, (h, w), blocks in zip(size.channels, size.grids, size.blocks, strict=True):
        width = c // 2 + CONDITION
        total += blocks * 18 * h * w * (c // 2 * width + width * c)
    h, w = size.grids[-1]
    halves = [c // 2 for c in size.channels]
    mixed = 18 * h * w * 2 * sum(halves) * (sum(halves) // 4)
    heads = sum(18 * gh * gw * 2 * half * half for half, (gh, gw) in zip(halves, size.grids, strict=True))
    return total + 2 * (mixed + heads)
