"""A part of two halves: swapped halves are seen by a model that knows where a tile lies, and by no other."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmsflow.data import ImageSet, folder
from fastmsflow.recipe import Recipe
from fastmsflow.tiling import Tiling
from fastmsflow.training import train
from tests.helpers.tiny_model import tiny_model

pytestmark = pytest.mark.slow

HEIGHT, WIDTH = 64, 128
RECIPE = Recipe(lr=3e-3, batch_size=8, meta_epochs=1, sub_epochs=8, warm_up=0)


@pytest.fixture(scope="module")
def halves(tmp_path_factory) -> ImageSet:
    """Noise, reddish on the left and bluish on the right; a defective image is a good one with swapped halves."""
    root = tmp_path_factory.mktemp("halves")
    for kind in ("train", "test/good", "test/swapped"):
        (root / kind).mkdir(parents=True)
    random = np.random.default_rng(0)
    tint = np.where(np.arange(WIDTH) < WIDTH // 2, 60, -60)[:, None] * [1, 0, -1]
    for i in range(12):
        coarse = random.normal(0, 30, (HEIGHT // 8, WIDTH // 8, 3)).repeat(8, 0).repeat(8, 1)
        pixels = (random.normal(128, 30, (HEIGHT, WIDTH, 3)) + coarse + tint).clip(0, 255).astype(np.uint8)
        if i < 6:
            Image.fromarray(pixels).save(root / f"train/{i}.png")
        else:
            Image.fromarray(pixels).save(root / f"test/good/{i}.png")
            Image.fromarray(np.roll(pixels, WIDTH // 2, axis=1)).save(root / f"test/swapped/{i}.png")
    return folder(root / "train", root / "test")


@pytest.mark.parametrize(("position", "low", "high"), [("image", 0.9, 1.0), ("tile", 0.4, 0.6)])
def test_swapped_parts_are_found_where_the_position_is_the_images(position, low, high, halves, tmp_path: Path) -> None:
    model = tiny_model()
    model.tiling = Tiling(32, overlap=0, position=position)
    result = train(model, halves, RECIPE, tmp_path / "run")
    assert low <= result.last.image_auroc_absolute <= high
