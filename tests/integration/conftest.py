"""Images, models and runs that whole commands work on."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image
from skimage import data as photographs

if TYPE_CHECKING:
    from fastmsflow import MSFlow

# Ray reads this once in a process. A process that asks for tokens, as by default, cannot work with a cluster without.
os.environ["RAY_AUTH_MODE"] = "disabled"


@pytest.fixture
def predict_parquet(predict) -> Callable[..., tuple[int, str, str]]:
    """Runs ``fastmsflow predict ARGS --format parquet``, unless another form is asked for."""
    pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'fastmsflow[shards]'")
    return lambda *args, form="parquet", **options: predict(*args, "--format", form, **options)


@pytest.fixture(scope="session")
def noise_images(tmp_path_factory) -> Path:
    """A folder of 18 images of 40x36: 00.png to 17.png."""
    folder = tmp_path_factory.mktemp("noise")
    random = np.random.default_rng(0)
    for i in range(18):
        Image.fromarray(random.integers(0, 256, (40, 36, 3), np.uint8)).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="session")
def noise_shards(noise_images: Path, tmp_path_factory) -> Path:
    """Shards of ``noise_images``, four to a shard; not to be written to."""
    pytest.importorskip("webdataset", reason="needs webdataset: pip install 'fastmsflow[shards]'")
    from fastmsflow.data import write_shards

    out = tmp_path_factory.mktemp("noise_shards") / "set"
    write_shards(sorted(noise_images.iterdir()), out, 4)
    return out


@pytest.fixture
def noise_shards_copy(noise_shards: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(noise_shards, tmp_path / "set"))


@pytest.fixture(scope="module")
def calibrated_model(noise_images: Path) -> "MSFlow":
    """A model for 32x32 by which half of ``noise_images`` are defective, and each has a region."""
    from tests.helpers.calibrated import calibrated

    return calibrated(sorted(noise_images.iterdir()), (32, 32))


@pytest.fixture(scope="module")
def checkpoint(calibrated_model: "MSFlow", tmp_path_factory) -> Path:
    """The file of ``calibrated_model``."""
    return saved(calibrated_model, tmp_path_factory)


def saved(model: "MSFlow", tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "calibrated.safetensors"
    model.save(path)
    return path


@pytest.fixture(scope="session")
def brick_tiles(tmp_path_factory) -> Path:
    """A folder of six tiles of 96x80: 0.png to 5.png."""
    folder = tmp_path_factory.mktemp("tiles")
    for i in range(6):
        Image.fromarray(photographs.brick()[i * 70 : i * 70 + 80, 60:156]).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def brick_model(brick_tiles: Path) -> "MSFlow":
    """A model for 64x64 by which three of ``brick_tiles`` are defective, and each has a region."""
    from tests.helpers.calibrated import calibrated

    return calibrated(sorted(brick_tiles.iterdir()), (64, 64))


@pytest.fixture(scope="module")
def brick_checkpoint(brick_model: "MSFlow", tmp_path_factory) -> Path:
    """The file of ``brick_model``."""
    return saved(brick_model, tmp_path_factory)


@pytest.fixture(scope="session")
def two_classes(tmp_path_factory) -> Path:
    """Classes a and b of 48 good training tiles, 10 good and 8 defective test tiles each, without masks."""
    root = tmp_path_factory.mktemp("tiles")
    for name, photograph in (("a", photographs.brick()), ("b", photographs.gravel())):
        for i in range(66):
            pixels = photograph[i * 6 : i * 6 + 80, (i % 3) * 100 : (i % 3) * 100 + 80].copy()
            if i < 48:
                target = root / name / f"train/good/{i:02}.png"
            elif i < 58:
                target = root / name / f"test/good/{i:02}.png"
            else:
                target = root / name / f"test/spot/{i:02}.png"
                pixels[30:50, 30:50] = 255 - pixels[30:50, 30:50]
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(target)
    return root


@pytest.fixture(scope="session")
def runs(two_classes: Path, tmp_path_factory) -> Path:
    """A run's folder for each class, a fifth of the images held out for 10% false alarms."""
    from tests.helpers.small_runs import SMALL, run, untrained

    out = tmp_path_factory.mktemp("runs")
    with untrained():
        for name in ("a", "b"):
            run(
                "train", two_classes, "--class", name, "--out", out / name, *SMALL, "--meta-epochs", 3,
                "--sub-epochs", 1, "--hold-out", 0.2, "--false-alarms", 0.1,
            )  # fmt: skip
    return out
