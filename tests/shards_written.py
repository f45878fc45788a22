"""A set of shards, written once, for the tests of writing and of reading them."""

import json
import shutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from fastmsflow import InputError
from fastmsflow.data import ShardedImages, list_images, write_shards

webdataset = pytest.importorskip("webdataset", reason="needs webdataset: pip install 'fastmsflow[shards]'")

SIZE = (32, 32)
ORDER = [22, 21, 33, 34, 4, 6, 32, 5]
IMAGES, PER_SHARD, SHARDS = 46, 4, 12


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """46 images in two folders; each folder has the same file names."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for i in range(IMAGES):
        folder = root / ("day 1", "day2")[i % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 36, 3), np.uint8)).save(folder / f"é.{i // 2:02}.jpg")
    return list_images(root)


@pytest.fixture(scope="module")
def written(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "set"
    write_shards(files, out, PER_SHARD)
    return out


@pytest.fixture
def shards(written: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(written, tmp_path / "set"))


@contextmanager
def refused_in_a_worker(message: str) -> Iterator[None]:
    with pytest.raises(InputError, match=message) as caught:
        yield
    # torch's error and its loader hold each other; left to the garbage collector, the workers are waited for in vain.
    traceback.clear_frames(caught.tb)


def numbers(images: ShardedImages, workers: int = 0, batch_size: int = 2) -> list[int]:
    return [int(i) for batch in DataLoader(images, batch_size, num_workers=workers) for i in batch["index"]]


def rewritten(folder: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
