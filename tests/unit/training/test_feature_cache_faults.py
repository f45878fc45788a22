"""Shards of a feature cache that are damaged, of another type or no files: one line, and nothing is trained on them."""

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastmsflow import InputError
from fastmsflow.recipe import Recipe
from fastmsflow.training.datamodule import FeatureTrainingData
from fastmsflow.training.feature_cache import FeatureCache
from tests.helpers.old_feature_cache import RECORDED, images, model

SHARD = "000001.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of two shards, and its one image file beside it."""
    root = tmp_path_factory.mktemp("whole")
    FeatureCache(model(), {"train": images(root)}, root / "cache", shard_bytes=3 * 1792).build()
    return root


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def opened(root: Path) -> FeatureCache:
    return FeatureCache(model(), {"train": images(root)}, root / "cache")


def prepared(root: Path) -> list[str]:
    """Prepares a training on the cache, and returns what is said."""
    said: list[str] = []
    data = FeatureTrainingData(model(), {"train": images(root)}, Recipe(), cache=root / "cache")
    data.prepare(say=said.append)
    return said


def test_zeroed_bytes_of_a_shard_end_the_run_before_anything_is_trained(root: Path) -> None:
    assert not any("checksum" in line for line in prepared(root))
    path = root / "cache" / SHARD
    content = bytearray(path.read_bytes())
    content[-704:-640] = bytes(64)
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"{SHARD}: damaged, its checksum is another; remove it to have it built"):
        prepared(root)
    path.unlink()
    prepared(root)
    assert opened(root).check() == 0


@pytest.mark.parametrize("place", [0, 1000, -1])
def test_one_bit_of_any_level_is_found(place: int, root: Path) -> None:
    path = root / "cache" / SHARD
    content = bytearray(path.read_bytes())
    content[place if place < 0 else int.from_bytes(content[:8], "little") + 8 + place] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{SHARD}: damaged, its checksum"):
        opened(root).check()


def test_processes_check_a_share_each(root: Path) -> None:
    path = root / "cache" / SHARD
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert opened(root).check(0, 2) == 0
    with pytest.raises(InputError, match="its checksum"):
        opened(root).check(1, 2)


def test_shards_of_an_earlier_version_are_read_and_told(root: Path) -> None:
    for path in RECORDED.iterdir():
        shutil.copy(path, root / "cache")
    assert opened(root).check() == 2
    assert any("2 shards of an earlier version have no checksum and are not checked" in line for line in prepared(root))


def rewritten(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    with safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, header)


SHARDS: dict[str, Callable[[Path], object]] = {
    "another dtype": lambda p: rewritten(p, lambda t: t.update(level0=t["level0"].float())),
    "whole numbers": lambda p: rewritten(p, lambda t: t.update(level0=t["level0"].view(torch.int16))),
    "another shape": lambda p: rewritten(p, lambda t: t.update(level1=t["level1"][:, :1])),
    "too few images": lambda p: rewritten(p, lambda t: t.update({k: v[:1] for k, v in t.items()})),
    "a level less": lambda p: rewritten(p, lambda t: t.pop("level2")),
    "another checksum": lambda p: rewritten(p, lambda t: t.update(sha256=t["sha256"][:3])),
    "no tensors": lambda p: save_file({}, p),
    "no safetensors": lambda p: p.write_bytes(b"nothing"),
    "nothing": lambda p: p.write_bytes(b""),
    "a folder": lambda p: (p.unlink(), p.mkdir()),
}


@pytest.mark.parametrize("kind", SHARDS)
def test_a_shard_that_is_none_is_one_line(kind: str, root: Path) -> None:
    SHARDS[kind](root / "cache" / SHARD)
    uses = [lambda: opened(root).check(), lambda: prepared(root)]
    if kind != "another checksum":
        uses.append(lambda: opened(root).take([3]))
    for use in uses:
        with pytest.raises(InputError, match=rf"{SHARD}: .*; remove it to have it built anew") as caught:
            use()
        assert "\n" not in str(caught.value)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


IMAGES: dict[str, bytes] = {
    "billions": header("{'descr': '|S16', 'fortran_order': False, 'shape': (100000000000,), }\n"),
    "objects": npy(np.array([None])),
    "numbers": npy(np.arange(5)),
    "a table": npy(np.zeros((5, 1), "S16")),
    "too few": npy(np.zeros(4, "S16")),
    "nesting": header("(" * 9000),
    "a header that is code": header("__import__('os').system('touch ran')"),
    "an archive": b"PK\x03\x04",
    "nothing": b"",
}


@pytest.mark.parametrize("kind", IMAGES)
def test_a_list_of_images_that_is_none_is_one_line(kind: str, root: Path) -> None:
    (root / "cache/images.npy").write_bytes(IMAGES[kind])
    with pytest.raises(InputError, match=r"images\.npy: damaged .*; remove the folder") as caught:
        opened(root)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs os.mkfifo")
def test_a_list_of_images_that_is_a_pipe_is_not_waited_for(root: Path) -> None:
    (root / "cache/images.npy").unlink()
    os.mkfifo(root / "cache/images.npy")
    with pytest.raises(InputError, match=r"images\.npy: a pipe or a device, not a file"):
        opened(root)


WRONG: tuple[Any, ...] = (None, True, 0, -1, 10**30, 0.5, float("nan"), "x", "x" * 10**6, [], [1], {}, {"a": 1})


@pytest.mark.parametrize("key", ["of", "images", "images a shard", "contents", "key"])
@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:20])
def test_a_description_of_another_type_is_one_line(key: str, value: Any, root: Path) -> None:
    path = root / "cache/cache.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(InputError) as caught:
        opened(root).check()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b"null", b"[" * 10**5, b"\xff", b"9" * 5000])
def test_a_description_that_is_none_is_one_line(content: bytes, root: Path) -> None:
    (root / "cache/cache.json").write_bytes(content)
    with pytest.raises(InputError, match=r"cache\.json: damaged \(.*\); remove the folder"):
        opened(root)


def test_shards_that_have_changed_places_are_found(root: Path) -> None:
    """Their features would be those of other images."""
    path = root / "cache/cache.json"
    path.unlink()
    (root / "cache/images.npy").unlink()
    for shard in (root / "cache").glob("*.safetensors"):
        shard.unlink()
    cache = FeatureCache(model(), {"train": images(root)}, root / "cache", shard_bytes=1)
    cache.build()
    assert cache.check() == 0
    first, second = root / "cache/000000.safetensors", root / "cache" / SHARD
    first.rename(root / "aside")
    second.rename(first)
    (root / "aside").rename(second)
    with pytest.raises(InputError, match=r"000000\.safetensors: damaged, its checksum is another"):
        opened(root).check()
