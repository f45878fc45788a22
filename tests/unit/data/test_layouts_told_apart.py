"""Tests the layout that a folder is taken for, where folders of another layout are much like it or lie beside it."""

import warnings
from pathlib import Path

import pytest
from PIL import Image

from fastmsflow.data import ImageSet, classes_of, open_image_set
from tests.helpers.mvtec_ad_2_tree import write_mvtec_ad_2
from tests.helpers.mvtec_loco_tree import write_mvtec_loco


def write(folder: Path, suffix: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for stem in ("000", "001"):
        Image.new("L", (32, 32), 255).save(folder / f"{stem}{suffix}.png")


def write_mvtec(base: Path, kind: str = "scratch", mask: str = "_mask") -> None:
    """Writes a class in the MVTec AD layout."""
    for folder in ("train/good", "test/good", f"test/{kind}"):
        write(base / folder)
    write(base / "ground_truth" / kind, mask)


def write_btad(base: Path) -> None:
    for folder in ("train/ok", "test/ok", "test/ko", "ground_truth/ko"):
        write(base / folder)


def opened(root: Path, category: str | None = None) -> ImageSet:
    """Opens a set; warnings of images that are not read do not matter here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return open_image_set(root, category)


def assert_is_mvtec(images: ImageSet, kind: str = "scratch") -> None:
    assert (images.validation, images.kinds_apart, images.has_masks) == ((), False, True)
    assert [sample.kind for sample in images.test] == ["good"] * 2 + [kind] * 2


@pytest.mark.parametrize("extra", ["validation/good", "test_private", "test_private_mixed"])
def test_a_class_of_mvtec_ad_with_a_folder_of_a_newer_layout_stays_one(extra: str, tmp_path: Path) -> None:
    write_mvtec(tmp_path / "bottle")
    write(tmp_path / "bottle" / extra)
    assert_is_mvtec(opened(tmp_path))
    assert_is_mvtec(opened(tmp_path / "bottle"))


@pytest.mark.parametrize("mask", ["_mask", ""])
@pytest.mark.parametrize("extra", ["validation/good", "other"])
def test_logical_anomalies_with_one_mask_an_image_are_a_kind_of_mvtec_ad(extra: str, mask: str, tmp_path: Path) -> None:
    write_mvtec(tmp_path / "box", "logical_anomalies", mask)
    write(tmp_path / "box" / extra)
    assert_is_mvtec(opened(tmp_path), "logical_anomalies")


def test_good_test_images_beside_ko_are_read(tmp_path: Path) -> None:
    for folder in ("train/ok", "test/good", "test/ko"):
        write(tmp_path / folder)
    assert [sample.kind for sample in open_image_set(tmp_path).test] == ["good"] * 2 + ["ko"] * 2


def test_classes_of_several_layouts_in_one_folder_are_each_read_by_their_own(tmp_path: Path) -> None:
    write_mvtec_ad_2(tmp_path, objects=("can",))
    write_mvtec_loco(tmp_path / "pushpins")
    write_mvtec(tmp_path / "bottle")
    write_btad(tmp_path / "01")
    assert classes_of(tmp_path) == ["bottle", "can", "pushpins"]
    assert len(open_image_set(tmp_path, "can").validation) == 2
    assert open_image_set(tmp_path, "pushpins").kinds_apart
    assert_is_mvtec(open_image_set(tmp_path, "bottle"))
    assert open_image_set(tmp_path, "01").has_masks


def test_a_class_of_btad_does_not_hide_those_of_mvtec_ad(tmp_path: Path) -> None:
    write_mvtec(tmp_path / "bottle")
    write_btad(tmp_path / "01")
    assert classes_of(tmp_path) == ["bottle"]
    assert_is_mvtec(open_image_set(tmp_path))
    assert_is_mvtec(open_image_set(tmp_path, ""))


def test_an_object_within_a_class_of_mvtec_ad_does_not_make_that_one(tmp_path: Path) -> None:
    for name in ("bottle", "cable"):
        write_mvtec(tmp_path / name)
    write_mvtec_ad_2(tmp_path / "bottle", objects=("can",))
    assert_is_mvtec(opened(tmp_path, "bottle"))


def test_a_link_that_leads_to_itself_is_no_class(tmp_path: Path) -> None:
    write_mvtec(tmp_path / "bottle")
    (tmp_path / "loop").symlink_to("loop")
    assert classes_of(tmp_path) == ["bottle"]
