"""Training and scoring with features that a feature cache holds."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr

from fastmsflow import InputError, MSFlow
from fastmsflow.data import ImageDataset, ImageSet, elpv, textures
from fastmsflow.nn.feature_extractor import LITE0_PACKAGE
from fastmsflow.training import DataConfig, Recipe, checkpointing, train
from fastmsflow.training.datamodule import TEST
from fastmsflow.training.feature_cache import FeatureCache
from fastmsflow.training.features_on_disk import FeaturesOnDisk
from tests.helpers.noise_images import noise_set
from tests.helpers.processes import CONTEXT
from tests.helpers.tiny_model import tiny_model
from tests.helpers.tolerances import BFLOAT16_CACHE, BFLOAT16_CACHE_RANKS

pytestmark = pytest.mark.slow

RECIPE = Recipe(lr=1e-3, batch_size=2, meta_epochs=2, sub_epochs=2, hold_out=0.2)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageSet:
    return noise_set(tmp_path_factory.mktemp("images"), train=10, test=2)


def train_with_cache(images: ImageSet, at: Path, resume: bool) -> None:
    torch.set_num_threads(1)
    checkpointing.SAVE_SECONDS = 0.0  # the state after every step
    data_config = DataConfig(feature_cache=at / "cache")
    train(tiny_model(standardise=True), images, RECIPE, at / "run", reading=data_config, resume=resume)


def test_killed_and_resumed_with_a_cache_a_run_ends_as_if_never_disturbed(images: ImageSet, tmp_path: Path) -> None:
    train_with_cache(images, tmp_path / "unbroken", False)
    process = CONTEXT.Process(target=train_with_cache, args=(images, tmp_path, False))
    process.start()
    while process.is_alive() and not (tmp_path / "run/state.ckpt").exists():
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(InputError, match="cache_dtype was bf16, is None"):
        train(tiny_model(standardise=True), images, RECIPE, tmp_path / "run", resume=True)
    train_with_cache(images, tmp_path, True)
    results = [json.loads((at / "run/results.json").read_text()) for at in (tmp_path / "unbroken", tmp_path)]
    assert results[0]["nll"] == results[1]["nll"]
    assert results[0]["metrics"] == results[1]["metrics"]
    for name in ("last", "best"):
        ours, theirs = (load_file(at / f"run/{name}.safetensors") for at in (tmp_path / "unbroken", tmp_path))
        assert all(torch.equal(ours[key], value) for key, value in theirs.items()), name


def test_the_command_builds_once_and_later_runs_read(images: ImageSet, no_downloads, command, tmp_path: Path) -> None:
    common = (
        "train", images.train[0].image.parents[1], "--extractor", "test_resnet.r160_in1k", "--image-size", 32,
        "--meta-epochs", 1, "--sub-epochs", 1, "--feature-cache", tmp_path / "cache", "--hold-out", 0,
    )  # fmt: skip
    code, out = command(*common, "--out", tmp_path / "first")
    assert code == 0
    assert "cache: 1.8 KiB an image" in out
    assert "pays off from pass" in out
    assert "features: 24.5 KiB, in memory" in out
    code, out = command(*common, "--out", tmp_path / "second", "--lr", 1e-3)
    assert code == 0
    assert "cache: " not in out
    code, out = command(*common, "--out", tmp_path / "third", "--cache-dtype", "float32")
    assert code == 1
    assert "a stale feature cache: dtype was bfloat16, is float32; remove the folder" in out
    code, out = command(*common, "--out", tmp_path / "third", "--cache-dtype", "int8")
    assert code == 1
    assert "a cache of 'int8' is not known; choose one of bf16, float32" in out
    assert not (tmp_path / "third").exists()


def real_images(name: str, root: Path) -> ImageSet:
    found = textures("gravel", root) if name == "gravel" else elpv("mono")
    return ImageSet(name, found.train[:16], found.test[:: len(found.test) // 24], (96, 96))


@pytest.mark.parametrize("name", ["gravel", "solar cells"])
def test_scores_from_features_in_bfloat16_are_those_from_float32_but_for_its_rounding(
    name: str, tmp_path: Path
) -> None:
    images = real_images(name, tmp_path / "textures")
    torch.manual_seed(0)
    model = MSFlow(
        "tf_efficientnet_lite0", image_size=images.image_size, extractor_weights=LITE0_PACKAGE, standardise=True,
        blocks=(1, 2, 2),
    )  # fmt: skip
    train(model, images, Recipe(lr=1e-3, meta_epochs=1, sub_epochs=4), tmp_path / "run")
    scores = []
    for dtype in (torch.float32, torch.bfloat16):
        test = ImageDataset(images.test, images.image_size)
        cache = FeatureCache(model, {TEST: test}, tmp_path / str(dtype), dtype=dtype)
        cache.build()
        features = FeaturesOnDisk(cache, cache.rows[TEST], model, "on disk")
        with torch.no_grad():
            levels = features.fetch(list(range(len(features))))
            scores.append(model.scores_of_features(levels))
    for kind in ("absolute_score", "log_score"):
        exact, rounded = (getattr(of, kind) for of in scores)
        relative = ((rounded - exact).abs().max() / exact.abs().max()).item()
        ranks = spearmanr(exact, rounded).statistic
        print(f"{name}, {kind}: {relative:.1e}, {ranks:.5f}")
        assert 0 < relative < BFLOAT16_CACHE
        assert ranks > BFLOAT16_CACHE_RANKS
