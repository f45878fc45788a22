"""A feature cache that an earlier version wrote is read, and gone on with."""

import shutil
from pathlib import Path

import pytest
import torch

from fastmsflow import InputError
from fastmsflow.training.feature_cache import FeatureCache
from fastmsflow.training.features_in_memory import pooled_features
from tests.helpers.old_feature_cache import COUNT, RECORDED, images, model
from tests.helpers.tolerances import CACHED

CACHE_FILES = ("cache.json", "images.npy", "000000.safetensors", "000001.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the recorded cache."""
    folder = tmp_path / "cache"
    folder.mkdir()
    for name in CACHE_FILES:
        shutil.copy(RECORDED / name, folder)
    return folder


def test_a_cache_of_an_earlier_version_is_read(folder: Path, tmp_path: Path) -> None:
    cache = FeatureCache(model(), {"train": images(tmp_path)}, folder)
    assert cache.missing() == []
    expected = pooled_features(cache.model, cache.images, range(COUNT))
    for level, computed in zip(cache.take(cache.rows["train"]), expected, strict=True):
        torch.testing.assert_close(level, computed.to(torch.bfloat16), **CACHED[torch.bfloat16])
    assert (folder / "cache.json").read_bytes() == (RECORDED / "cache.json").read_bytes()


def test_an_unfinished_cache_of_an_earlier_version_is_finished(folder: Path, tmp_path: Path) -> None:
    whole = FeatureCache(model(), {"train": images(tmp_path)}, folder).take([3, 4])
    (folder / "000001.safetensors").unlink()
    cache = FeatureCache(model(), {"train": images(tmp_path)}, folder)
    assert cache.missing() == [1]
    cache.build()
    for level, before in zip(cache.take([3, 4]), whole, strict=True):
        torch.testing.assert_close(level, before, **CACHED[torch.bfloat16])


def test_a_cache_of_an_earlier_version_refuses_another_extractor(folder: Path, tmp_path: Path) -> None:
    other = model()
    next(other.extractor.parameters()).data += 1
    with pytest.raises(InputError, match="a stale feature cache: extractor weights was 0fbf3c7b9d3260ce, is "):
        FeatureCache(other, {"train": images(tmp_path)}, folder)
