"""The sample set of large images: sizes, masks, and what training and test images have in common."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data as photographs
from skimage.measure import label, regionprops

from fastmsflow import InputError
from fastmsflow.data import classes_of, open_image_set, quilting, small_defects, synthetic_small_defects
from fastmsflow.data.image_set import ImageSet
from fastmsflow.data.layouts.small_defects import CLASSES
from fastmsflow.data.synthetic_small_defects import (
    APART,
    EXTENT,
    LEAST_CHANGE,
    SMALL_DEFECTS,
    with_small_defects,
)
from fastmsflow.data.synthetic_textures import TEST_FROM

SIZE = (760, 1000)


@pytest.fixture(scope="module")
def gravel(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return small_defects("gravel", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the set written with seven images."""
    for name in ("TRAINING_IMAGES", "GOOD_TEST_IMAGES", "TESTS_PER_DEFECT"):
        monkeypatch.setattr(synthetic_small_defects, name, 1)
    monkeypatch.setattr(quilting, "CANDIDATES", 20)


def read(path: Path | None) -> np.ndarray:
    assert path is not None
    return np.asarray(Image.open(path))


def test_images_have_their_full_size_and_masks_theirs(gravel: ImageSet) -> None:
    labels = [sample.label for sample in gravel.test]
    assert (len(gravel.train), labels.count(0), labels.count(1)) == (24, 20, 30)
    assert gravel.has_masks and gravel.image_size == (256, 256) and "CC0" in gravel.licence
    assert {sample.kind for sample in gravel.test} == {"good", *SMALL_DEFECTS}
    assert {Image.open(sample.image).size for sample in (*gravel.train, *gravel.test)} == {SIZE[::-1]}
    assert {read(sample.mask).shape for sample in gravel.test if sample.mask} == {SIZE}


def test_each_mask_has_one_to_three_defects_of_6_to_20_pixels(gravel: ImageSet) -> None:
    counts = set()
    for sample in gravel.test:
        if sample.label:
            defects = regionprops(label(read(sample.mask) > 127, connectivity=2))
            counts.add(len(defects))
            for top, left, bottom, right in (defect.bbox for defect in defects):
                assert 6 <= max(bottom - top, right - left) <= 20
    assert counts == {1, 2, 3}


def test_no_pixels_of_the_photograph_are_in_both_training_and_test_images(gravel: ImageSet) -> None:
    photograph = photographs.gravel()
    # Sixteen pixels in a row are found once in the photograph.
    parts = [
        {rows[y, x : x + 16].tobytes() for y in range(len(rows)) for x in range(497)}
        for rows in (photograph[:TEST_FROM], photograph[TEST_FROM:])
    ]
    assert not parts[0] & parts[1]
    good = [sample for sample in gravel.test if not sample.label]
    for samples, own, other in ((gravel.train, parts[0], parts[1]), (good, parts[1], parts[0])):
        for sample in samples[::6]:
            image = read(sample.image)
            rows = [image[y, x : x + 16].tobytes() for y in range(0, SIZE[0], 7) for x in range(0, SIZE[1] - 16, 16)]
            # The rest lies across the line between two blocks.
            assert np.mean([row in own for row in rows]) > 0.6
            assert not any(row in other for row in rows)


@pytest.mark.parametrize("kind", SMALL_DEFECTS)
@pytest.mark.parametrize("texture", CLASSES)
def test_a_defect_is_where_its_mask_is_and_nowhere_else(texture: str, kind: str) -> None:
    region = getattr(photographs, texture)()[TEST_FROM:]
    clean = np.pad(region, ((0, 100), (0, 0)), mode="reflect")
    before = clean.copy()
    unchanged = []
    for seed in range(5):
        image, mask = with_small_defects(clean, SMALL_DEFECTS[kind], np.random.default_rng(seed))
        assert np.array_equal(clean, before), "the clean image was drawn on"
        assert np.array_equal(image[~mask], clean[~mask])
        change = np.abs(image.astype(int) - clean)
        unchanged.append(np.mean(change[mask] <= 3))
        places = regionprops(label(mask, connectivity=2))
        for place in places:
            top, left, bottom, right = place.bbox
            assert EXTENT[0] <= max(bottom - top, right - left) <= EXTENT[1]
            assert change[tuple(place.coords.T)].mean() >= LEAST_CHANGE
            around = mask[max(0, top - APART) : bottom + APART, max(0, left - APART) : right + APART]
            assert around.sum() == place.area, "two defects lie side by side"
    assert np.mean(unchanged) < 0.15, "the mask marks pixels that look as before"


def test_the_set_is_the_same_bytes_every_time(few: None, tmp_path: Path) -> None:
    for name in ("one", "two"):
        small_defects("grass", tmp_path / name)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.png"))
    assert len(files) == 7 + len(SMALL_DEFECTS)
    assert files == sorted(p.relative_to(tmp_path / "two") for p in (tmp_path / "two").rglob("*.png"))
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)


def test_the_set_is_opened_by_its_name_from_the_users_cache(
    few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    images = open_image_set("small_defects", "gravel")
    assert images.name == "small_defects gravel"
    assert images.train[0].image.is_relative_to(tmp_path / "fastmsflow" / "small_defects-v1" / "gravel")
    assert classes_of("small_defects") == ["brick", "grass", "gravel"]
    with pytest.raises(InputError, match=r"small_defects: no class 'sand' \(there: brick, grass, gravel\)"):
        open_image_set("small_defects", "sand")
