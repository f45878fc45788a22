"""The layout of MVTec LOCO AD, masks of several files, and what is wrong in a tree of it."""

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastmsflow import InputError
from fastmsflow.data import classes_of, fingerprint, load_mask, mvtec_loco, open_image_set
from fastmsflow.data.fingerprint import names_fingerprint
from fastmsflow.errors import InputWarning
from fastmsflow.evaluation.ground_truth import GroundTruth
from tests.helpers.mvtec_loco_tree import write_mvtec_loco


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    write_mvtec_loco(tmp_path / "loco/pushpins")
    return tmp_path / "loco"


def test_splits_and_kinds_are_those_of_the_folders(tree: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = open_image_set(tree)
    assert (images.name, len(images.train), len(images.validation)) == ("pushpins", 6, 3)
    kinds = [sample.kind for sample in images.test]
    assert kinds == ["good"] * 3 + ["logical_anomalies"] * 3 + ["structural_anomalies"] * 3
    assert [sample.label for sample in images.test] == [0] * 3 + [1] * 6
    assert images.has_masks and images.kinds_apart
    assert classes_of(tree) == ["pushpins"]
    assert open_image_set(tree / "pushpins") == images
    with pytest.raises(InputError, match="it is one class itself: leave the class out"):
        open_image_set(tree / "pushpins", "pushpins")


def test_the_mask_of_an_image_is_the_union_of_its_files_whatever_their_values(tree: Path) -> None:
    sample = mvtec_loco(tree, "pushpins").test[3]
    mask = load_mask(sample, None)
    expected = torch.zeros(48, 64, dtype=torch.bool)
    expected[8:14, 10:16] = expected[8:14, 30:36] = True
    assert torch.equal(mask, expected)


def test_every_file_of_a_mask_is_part_of_a_sets_fingerprint(tree: Path) -> None:
    before = open_image_set(tree)
    prints = fingerprint(before), names_fingerprint(before)
    second = tree / "pushpins/ground_truth/logical_anomalies/000/001.png"
    Image.new("L", (64, 48)).save(second)
    assert fingerprint(before) != prints[0]
    assert names_fingerprint(before) != prints[1]
    second.unlink()
    assert fingerprint(before) not in (prints[0], fingerprint(open_image_set(tree / "pushpins/train/good")))


@pytest.mark.parametrize("image_size", [(48, 64), None], ids=["read at once", "read later"])
def test_one_file_of_another_size_is_named(image_size: tuple[int, int] | None, tree: Path) -> None:
    Image.new("L", (20, 30), 255).save(tree / "pushpins/ground_truth/logical_anomalies/001/001.png")
    with pytest.raises(InputError, match=r"001/001\.png: the mask is 20x30, its image 001\.png 64x48"):
        GroundTruth.from_image_set(open_image_set(tree), image_size)


def test_masks_that_mark_nothing_are_warned_of_by_their_folder(tree: Path) -> None:
    folder = tree / "pushpins/ground_truth/structural_anomalies/002"
    Image.new("L", (64, 48)).save(folder / "000.png")
    with pytest.warns(InputWarning, match=r"1 mask marks no pixel: .*structural_anomalies/002; draw the defects"):
        GroundTruth.from_image_set(open_image_set(tree), (48, 64))


def test_an_image_without_masks_is_named(tree: Path) -> None:
    folder = tree / "pushpins/ground_truth/logical_anomalies/001"
    message = r"logical_anomalies/001\.png: has no mask; put one of each defect into .*/logical_anomalies/001, as 000"
    (folder / "000.png").rename(tree / "pushpins/ground_truth/logical_anomalies/001.png")
    (folder / "001.png").unlink()
    with pytest.raises(InputError, match=message):
        open_image_set(tree)
    folder.rmdir()
    with pytest.raises(InputError, match=message):
        open_image_set(tree)


def test_a_folder_of_masks_that_is_emptied_later_is_named(tree: Path) -> None:
    sample = open_image_set(tree).test[-1]
    assert sample.mask is not None
    (sample.mask / "000.png").unlink()
    with pytest.raises(InputError, match=r"structural_anomalies/002: holds no masks; put one of each defect into it"):
        load_mask(sample, None)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("validation/good", r"pushpins/validation/good: no such folder"),
        ("train/good", r"no class 'pushpins' \(there: screw_bag\)"),
        ("", r"no class 'pushpins' \(there: screw_bag\)"),
    ],
)
def test_a_missing_folder_or_a_class_that_is_a_file_is_named(missing: str, message: str, tree: Path) -> None:
    write_mvtec_loco(tree / "screw_bag")
    shutil.rmtree(tree / "pushpins" / missing)
    if not missing:
        (tree / "pushpins").write_text("")
    with pytest.raises(InputError, match=message):
        open_image_set(tree, "pushpins")


def test_without_masks_and_with_a_folder_that_is_not_read(tree: Path) -> None:
    shutil.rmtree(tree / "pushpins/ground_truth")
    (tree / "pushpins/test/good").rename(tree / "pushpins/test/fine")
    (tree / "pushpins/test/logical_anomalies").rename(tree / "pushpins/test/other")
    with pytest.warns(InputWarning, match=r"6 files look like images and are not read \(3 in test/.*KIND being good,"):
        images = open_image_set(tree)
    assert not images.has_masks
    assert {sample.kind for sample in images.test} == {"structural_anomalies"}
