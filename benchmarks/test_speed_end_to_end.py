"""Measures from the image tensor to scores and maps, and a training step as it is shipped."""

import pytest
import torch

from benchmarks.contestants import Contestant
from benchmarks.parity_gate import Reference, image_step_gate, prediction_gate
from benchmarks.suite_settings import DEVICE, Size, measure, rotated


def images(size: Size, batch: int) -> torch.Tensor:
    """The same for every contestant."""
    generator = torch.Generator().manual_seed(batch)
    return torch.rand(batch, 3, size.image, size.image, generator=generator).to(DEVICE)


def random_images(contestant: Contestant, size: Size, batch: int) -> list[torch.Tensor]:
    x = torch.rand(batch, 3, size.image, size.image, device=DEVICE)
    return [x.contiguous(memory_format=contestant.layout)]


@pytest.mark.benchmark(group="end-to-end inference")
def test_end_to_end_inference(
    benchmark, contestant: Contestant, size: Size, batch: int, before: int, reference: Reference
) -> None:
    given = images(size, batch).contiguous(memory_format=contestant.layout)
    gate = prediction_gate(contestant, reference, given)
    benchmark.extra_info |= {"contestant": contestant.name, "images": batch, "gate": gate.as_dict()}
    inputs = rotated(lambda: random_images(contestant, size, batch))
    measure(benchmark, lambda x: contestant.predict(x[0]), inputs, before)
    gate.require()


@pytest.mark.benchmark(group="training step")
def test_training_step(benchmark, contestant: Contestant, size: Size, before: int, reference: Reference) -> None:
    batch = size.training_batch
    given = images(size, batch).contiguous(memory_format=contestant.layout)
    gate = image_step_gate(contestant, reference, given)
    benchmark.extra_info |= {"contestant": contestant.name, "images": batch, "gate": gate.as_dict()}
    inputs = rotated(lambda: random_images(contestant, size, batch))
    measure(benchmark, lambda x: contestant.image_step(x[0]), inputs, before)
    gate.require()
