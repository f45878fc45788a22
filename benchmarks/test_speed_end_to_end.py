"""From the image tensor: to scores and maps; a training step as it is shipped."""

import pytest
import torch

from benchmarks.contestants import Contestant
from benchmarks.gate import check_predictions
from benchmarks.setting import DEVICE, Size, measure, rotated
from fastmsflow import MSFlow


def images(contestant: Contestant, size: Size, batch: int) -> list[torch.Tensor]:
    x = torch.rand(batch, 3, size.image, size.image, device=DEVICE)
    return [x.contiguous(memory_format=contestant.layout)]


@pytest.mark.benchmark(group="end-to-end inference")
def test_end_to_end_inference(
    benchmark, contestant: Contestant, model: MSFlow, size: Size, batch: int, before: int
) -> None:
    benchmark.extra_info |= {"contestant": contestant.name, "images": batch}
    check_predictions(contestant, model, images(contestant, size, batch)[0])
    inputs = rotated(lambda: images(contestant, size, batch))
    measure(benchmark, lambda x: contestant.predict(x[0]), inputs, before)


@pytest.mark.benchmark(group="training step")
def test_training_step(benchmark, contestant: Contestant, size: Size, before: int) -> None:
    batch = size.training_batch
    benchmark.extra_info |= {"contestant": contestant.name, "images": batch}
    inputs = rotated(lambda: images(contestant, size, batch))
    measure(benchmark, lambda x: contestant.image_step(x[0]), inputs, before)
