"""Measures from the image tensor to scores and maps, and a training step as it is shipped."""

import pytest
import torch

from benchmarks.contestants import Contestant
from benchmarks.interleaved import Entry, TimeRow
from benchmarks.parity_gate import Reference, image_step_gate, prediction_gate
from benchmarks.suite_settings import DEVICE, Size, rotated


def images(size: Size, batch: int) -> torch.Tensor:
    """The same for every contestant."""
    generator = torch.Generator().manual_seed(batch)
    return torch.rand(batch, 3, size.image, size.image, generator=generator).to(DEVICE)


def random_images(contestant: Contestant, size: Size, batch: int) -> list[torch.Tensor]:
    x = torch.rand(batch, 3, size.image, size.image, device=DEVICE)
    return [x.contiguous(memory_format=contestant.layout)]


@pytest.mark.benchmark(group="end-to-end inference")
def test_end_to_end_inference(benchmark, time_row: TimeRow, size: Size, batch: int, reference: Reference) -> None:
    def enter(contestant: Contestant) -> Entry:
        given = images(size, batch).contiguous(memory_format=contestant.layout)
        return Entry(
            precision=contestant.precision,
            gate=prediction_gate(contestant, reference, given),
            call=lambda x: contestant.predict(x[0]),
            inputs=rotated(lambda: random_images(contestant, size, batch)),
        )

    benchmark.extra_info |= {"images": batch}
    time_row(enter)


@pytest.mark.benchmark(group="training step")
def test_training_step(benchmark, time_row: TimeRow, size: Size, reference: Reference) -> None:
    batch = size.training_batch

    def enter(contestant: Contestant) -> Entry:
        given = images(size, batch).contiguous(memory_format=contestant.layout)
        return Entry(
            precision=contestant.training_precision,
            gate=image_step_gate(contestant, reference, given),
            call=lambda x: contestant.image_step(x[0]),
            inputs=rotated(lambda: random_images(contestant, size, batch)),
        )

    benchmark.extra_info |= {"images": batch}
    time_row(enter)
