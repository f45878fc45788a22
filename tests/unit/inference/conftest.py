"""A model, images of several sizes and what BatchScorer makes of them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from fastmsflow import MSFlow
    from fastmsflow.inference import BatchScorer


@pytest.fixture(scope="session")
def batch_arrays() -> list[np.ndarray]:
    """12 images of four sizes in turn; the second, sixth and tenth are of the size of ``batch_model``."""
    random, sizes = np.random.default_rng(0), ((40, 36), (32, 48), (36, 40), (64, 32))
    return [random.integers(0, 256, (*sizes[i % 4], 3), np.uint8) for i in range(12)]


@pytest.fixture(scope="session")
def batch_images(batch_arrays: list[np.ndarray], tmp_path_factory) -> list[Path]:
    """The files of ``batch_arrays``: 00.png to 11.png."""
    folder = tmp_path_factory.mktemp("images")
    for i, array in enumerate(batch_arrays):
        Image.fromarray(array).save(folder / f"{i:02}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="session")
def batch_contents(batch_images: list[Path]) -> list[bytes]:
    """The bytes of ``batch_images``."""
    return [path.read_bytes() for path in batch_images]


@pytest.fixture(scope="module")
def batch_model(batch_images: list[Path]) -> "MSFlow":
    """A model for 32x48 by which half of ``batch_images`` are defective; some have regions, others none."""
    from tests.helpers.calibrated import calibrated

    return calibrated(batch_images, (32, 48), without_region=3)


@pytest.fixture(scope="module")
def batch_checkpoint(batch_model: "MSFlow", tmp_path_factory) -> Path:
    """The file of ``batch_model``."""
    path = tmp_path_factory.mktemp("model") / "calibrated.safetensors"
    batch_model.save(path)
    return path


@pytest.fixture(scope="module")
def scorer(batch_checkpoint: Path) -> "BatchScorer":
    """Scores by ``batch_model`` in float32."""
    from fastmsflow.inference import BatchScorer

    return BatchScorer(batch_checkpoint, dtype="float32", device="cpu").load()


@pytest.fixture(scope="module")
def expected(scorer: "BatchScorer", batch_contents: list[bytes]) -> dict[str, Any]:
    """The results of ``batch_images``."""
    return scorer({"bytes": batch_contents})
