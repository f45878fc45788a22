"""The image sets that pip installs; small_defects has a file of its own."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data as photographs

from fastmsflow import InputError, UnavailableError
from fastmsflow.data import elpv, textures
from fastmsflow.data.layouts import elpv as elpv_layout
from fastmsflow.data.layouts.textures import TEXTURES
from fastmsflow.data.synthetic_textures import DEFECTS, TEST_FROM, TILE, held_out_tiles, training_tiles


@pytest.mark.parametrize(("kind", "train", "good", "defective"), [("mono", 471, 117, 313), ("poly", 736, 184, 402)])
def test_elpv_has_the_published_counts(kind: str, train: int, good: int, defective: int) -> None:
    images = elpv(kind)
    labels = [sample.label for sample in images.test]
    assert (len(images.train), labels.count(0), labels.count(1)) == (train, good, defective)
    assert "CC BY-NC-SA 4.0" in images.licence
    assert not images.has_masks
    assert images.image_size == (256, 256)


def test_elpvs_split_is_the_documented_one() -> None:
    images = elpv("mono")
    data = images.train[0].image.parents[1]
    rows = [line.split() for line in (data / "labels.csv").read_text().splitlines()]
    good = [image for image, probability, module in rows if module == "mono" and float(probability) == 0]
    random.Random(0).shuffle(good)
    assert [s.image for s in images.test if not s.label] == [data / name for name in good[:117]]
    assert [s.image for s in images.train] == [data / name for name in good[117:]]
    assert not {s.image for s in images.train} & {s.image for s in images.test}
    assert all(s.image.is_file() for s in (*images.train, *images.test))


def test_missing_packages_are_named_with_the_remedy(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(elpv_layout, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="pip install elpv-dataset"):
        elpv()
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    with pytest.raises(UnavailableError, match="pip install scikit-image"):
        textures("brick", tmp_path)


def test_unknown_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="mono, poly, all"):
        elpv("thin-film")
    with pytest.raises(InputError, match="brick, grass, gravel"):
        textures("sand", tmp_path)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    for kind in TEXTURES:
        textures(kind, folder)
    return folder


@pytest.mark.parametrize("kind", ["brick", "grass", "gravel"])
def test_textures_have_masks_for_every_defect(kind: str, cache: Path) -> None:
    images = textures(kind, cache)
    labels = [sample.label for sample in images.test]
    assert (len(images.train), labels.count(0), labels.count(1)) == (169, 40, 60)
    assert images.has_masks
    assert "CC0" in images.licence
    assert {sample.kind for sample in images.test} == {"good", *DEFECTS}


@pytest.mark.parametrize("texture", TEXTURES)
@pytest.mark.parametrize("kind", DEFECTS)
def test_a_defect_changes_what_its_mask_marks_and_nothing_else(kind: str, texture: str) -> None:
    tile = held_out_tiles(getattr(photographs, texture)())[7]
    other = held_out_tiles(getattr(photographs, TEXTURES[texture])())[3]
    unchanged = []
    for seed in range(20):
        image, mask = DEFECTS[kind](tile, np.random.default_rng(seed), other)
        assert np.array_equal(image[~mask], tile[~mask])
        assert mask.any()
        assert mask.mean() < 0.2
        unchanged.append(np.mean(np.abs(image[mask].astype(int) - tile[mask]) <= 3))
    assert np.mean(unchanged) < 0.15, "the mask marks pixels that look as before"


def test_saved_masks_are_those_of_the_saved_images(cache: Path) -> None:
    clean = {tile.tobytes() for tile in held_out_tiles(photographs.brick())}
    tiles = np.stack(held_out_tiles(photographs.brick())).astype(int)
    for sample in textures("brick", cache).test:
        image = np.asarray(Image.open(sample.image))
        if sample.label == 0:
            assert image.tobytes() in clean
        else:
            mask = np.asarray(Image.open(sample.mask)) > 127
            outside = np.abs(tiles - image)[:, ~mask].sum(axis=1)
            assert outside.min() == 0  # some tile of the photograph, unchanged outside the mask


def test_no_pixel_is_in_both_training_and_test_tiles() -> None:
    rows = np.tile(np.arange(512)[:, None], (1, 512))
    assert (
        max(tile.max() for tile in training_tiles(rows)) < TEST_FROM <= min(tile.min() for tile in held_out_tiles(rows))
    )
    assert {tile.shape for tile in (*training_tiles(rows), *held_out_tiles(rows))} == {(TILE, TILE)}


def test_textures_are_the_same_bytes_every_time(cache: Path, tmp_path: Path) -> None:
    textures("grass", tmp_path)
    files = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*.png"))
    assert files == sorted(p.relative_to(cache) for p in (cache / "grass").rglob("*.png"))
    assert all((tmp_path / name).read_bytes() == (cache / name).read_bytes() for name in files)


def test_a_failure_on_the_way_leaves_no_half_set(tmp_path: Path, monkeypatch) -> None:
    written = []

    def fail(self, path) -> None:
        if len(written) == 50:
            raise OSError("disk full")
        written.append(path)
        Path(path).write_bytes(b"")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        textures("gravel", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_textures_are_written_below_the_users_cache_by_default(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert textures("brick").train[0].image.is_relative_to(tmp_path / "fastmsflow" / "textures-v1" / "brick")
