"""The comparison at high resolution gives all models' maps the images' full size, and draws them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import high_resolution
from benchmarks.high_resolution import SIZE, WAYS, picture
from fastmsflow.data import ImageSet, Sample
from fastmsflow.tiling import Tiling
from tests.helpers.tiny_model import tiny_model


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageSet:
    """One defective image, whose defect lies in the lower right corner."""
    gray = np.random.default_rng(0).integers(90, 160, SIZE, dtype=np.uint8)
    mask = np.zeros(SIZE, dtype=np.uint8)
    mask[-12:, -9:] = 255
    Image.fromarray(np.where(mask, 0, gray).astype(np.uint8)).save(tmp_path / "image.png", compress_level=1)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    monkeypatch.setattr(high_resolution, "SMALL_DEFECTS", ["hole"])
    return ImageSet("small_defects hole", (), (Sample(tmp_path / "image.png", 1, tmp_path / "mask.png", "hole"),))


@torch.no_grad()
def test_each_ways_maps_have_the_images_size_and_are_drawn_around_the_defect(images: ImageSet) -> None:
    model = tiny_model(image_size=(256, 256)).eval()
    model.tiling = Tiling(256)
    maps = [torch.cat([scores.absolute_map for scores in way.score(model, images.test)]) for way in WAYS[:2]]
    assert [of_way.shape for of_way in maps] == [(1, *SIZE), (1, *SIZE)]
    assert not torch.allclose(*maps)
    drawn = np.asarray(picture(images, maps))
    assert drawn.shape == (256, 3 * 256, 3)
    # The defect, at twice its size, in the corner of the image's own cell.
    assert (drawn[-24:, 256 - 18 : 256] == 0).all() and (drawn[-26, 100:256] > 0).all()
