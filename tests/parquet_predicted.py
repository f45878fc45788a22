"""A model, images and shards of them, for the tests of predicting into Parquet; and what came of it."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastmsflow import MSFlow
from fastmsflow.calibration import Calibration
from fastmsflow.data import load_image, write_shards
from fastmsflow.files import LOCK_FILE

pq = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow: pip install 'fastmsflow[shards]'")
pytest.importorskip("webdataset", reason="needs webdataset: pip install 'fastmsflow[shards]'")


IMAGES, PER_PART = 18, 4
SIZES = [4, 4, 4, 4, 2]
SCORES = ("score", "log_score", "absolute_score")
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(predict) -> Command:
    """``fastmsflow predict ARGS --format parquet``, unless another form is asked for."""
    return lambda *args, form="parquet", **options: predict(*args, "--format", form, **options)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for i in range(IMAGES):
        Image.fromarray(random.integers(0, 256, (40, 36, 3), np.uint8)).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def written(images: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "set"
    write_shards(sorted(images.iterdir()), out, PER_PART)
    return out


@pytest.fixture
def shards(written: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(written, tmp_path / "set"))


@pytest.fixture(scope="module")
def network(images: Path) -> MSFlow:
    """Untrained, and calibrated so that half of the images are defective, and each has a region."""
    torch.manual_seed(0)
    model = MSFlow("test_efficientnet", pretrained=False, image_size=(32, 32), blocks=(1, 1, 1)).eval()
    with torch.no_grad():
        scores = model.scores(torch.stack([load_image(p, (32, 32)) for p in sorted(images.iterdir())]))
    middle = float(scores.absolute_score.sort().values[IMAGES // 2 - 1 : IMAGES // 2 + 1].mean())
    peaks, pixels = scores.absolute_map.flatten(1).amax(dim=1), scores.absolute_map.flatten()
    model.calibration = Calibration((middle,) * 20, (0.9 * float(peaks.min()),) * 20, float(pixels.median()))
    return model


@pytest.fixture(scope="module")
def model(network: MSFlow, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "calibrated.safetensors"
    network.save(path)
    return path


def table(part: Path) -> Any:
    # Not by its name: that would be open until the garbage collector comes, and a disk cannot be taken away.
    return pq.read_table(io.BytesIO(part.read_bytes()))


def rows(out: Path) -> list[dict[str, Any]]:
    """Of all parts, in their order."""
    return [row for path in sorted(out.glob("parts/part-*.parquet")) for row in table(path).to_pylist()]


def setting(out: Path) -> dict[str, Any]:
    return json.loads((out / "predictions.json").read_text())


def times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("parts/part-*.parquet")}


def contents(out: Path) -> dict[str, bytes]:
    """All files but those that are locked."""
    files = (path for path in sorted(out.rglob("*")) if path.is_file() and path.name != LOCK_FILE)
    return {path.name: path.read_bytes() for path in files}
