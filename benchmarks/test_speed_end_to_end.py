"""From the image tensor: to scores and maps; a training step as it is shipped."""

import pytest
import torch

from benchmarks.contestants import Contestant
from benchmarks.setting import DEVICE, Size, measure, rotated


def images(contestant: Contestant, size: Size, batch: int) -> list[torch.Tensor]:
    x = torch.rand(batch, 3, size.image, size.image, device=DEVICE)
    return [x.contiguous(memory_format=contestant.layout)]


@pytest.mark.benchmark(group="end-to-end inference")
def test_end_to_end_inference(benchmark, contestant: Contestant, size: Size, batch: int) -> None:
    benchmark.extra_info |= {"contestant": contestant.name, "images": batch}
    measure(benchmark, lambda x: contestant.predict(x[0]), rotated(lambda: images(contestant, size, batch)))


@pytest.mark.benchmark(group="training step")
def test_training_step(benchmark, contestant: Contestant, size: Size) -> None:
    batch = size.training_batch
    benchmark.extra_info |= {"contestant": contestant.name, "images": batch}
    measure(benchmark, lambda x: contestant.image_step(x[0]), rotated(lambda: images(contestant, size, batch)))
