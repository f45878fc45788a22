"""A set of shards, written once."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    pass


@pytest.fixture(scope="session")
def jpeg_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """46 images in two folders; each folder has the same file names."""
    from fastmsflow.data import list_images

    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for i in range(46):
        folder = root / ("day 1", "day2")[i % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 36, 3), np.uint8)).save(folder / f"é.{i // 2:02}.jpg")
    return list_images(root)


@pytest.fixture(scope="session")
def jpeg_shards(jpeg_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of ``jpeg_files``, four to a shard; not to be written to."""
    pytest.importorskip("webdataset", reason="needs webdataset: pip install 'fastmsflow[shards]'")
    from fastmsflow.data import write_shards

    out = tmp_path_factory.mktemp("shards") / "set"
    write_shards(jpeg_files, out, 4)
    return out


@pytest.fixture
def jpeg_shards_copy(jpeg_shards: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(jpeg_shards, tmp_path / "set"))
