"""The layout of MVTec AD 2, and what is wrong in a tree of it."""

import shutil
import warnings
from pathlib import Path

import pytest
from PIL import Image

from fastmsflow import InputError
from fastmsflow.data import ImageDataset, classes_of, mvtec_ad_2, open_image_set, private_images
from fastmsflow.data.image_set import Sample
from fastmsflow.data.layouts.mvtec_ad_2 import OBJECTS
from fastmsflow.errors import InputWarning
from tests.helpers.mvtec_ad_2_tree import write_mvtec_ad_2


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_mvtec_ad_2(tmp_path / "ad2", objects=("can", "rice"))


def below(root: Path, samples: tuple[Sample, ...]) -> list[str]:
    return [str(sample.image.relative_to(root)) for sample in samples]


def test_each_split_has_its_own_images_and_private_ones_are_nobodys(tree: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = open_image_set(tree, "can")
    assert images.name == "can"
    assert below(tree, images.train) == [f"can/train/good/{i:03}_regular.png" for i in range(4)]
    assert below(tree, images.validation) == [f"can/validation/good/{i:03}_regular.png" for i in range(2)]
    assert [(s.kind, s.label) for s in images.test] == [("bad", 1)] * 2 + [("good", 0)] * 2
    assert images.has_masks
    masked = ImageDataset(images.test, (48, 64))
    assert [int(masked[i]["mask"].sum()) for i in range(4)] == [36, 36, 0, 0]


def test_all_eight_objects_are_classes_and_one_of_them_is_a_source_itself(tmp_path: Path) -> None:
    root = write_mvtec_ad_2(tmp_path, size=(32, 32))
    assert tuple(classes_of(root)) == OBJECTS
    assert open_image_set(root / "walnuts") == open_image_set(root, "walnuts")
    with pytest.raises(InputError, match=r"no class 'can' .*; it is one object itself: leave the class out"):
        open_image_set(root / "can", "can")
    with pytest.raises(InputError, match="did you mean wallplugs"):
        open_image_set(root, "wallplug")


def test_objects_of_other_names_are_found_by_their_structure(tmp_path: Path) -> None:
    root = write_mvtec_ad_2(tmp_path, objects=("lid",))
    assert len(open_image_set(root).validation) == 2


def test_without_public_test_images_there_is_nothing_to_test_on(tree: Path) -> None:
    shutil.rmtree(tree / "can/test_public")
    images = mvtec_ad_2(tree, "can")
    assert (len(images.train), images.test) == (4, ())


def test_other_images_in_an_objects_folder_are_told_of(tree: Path) -> None:
    (tree / "can/extra").mkdir()
    Image.new("L", (32, 32)).save(tree / "can/extra/0.png")
    with pytest.warns(InputWarning, match=r"^1 file looks like an image and is not read \(1 in extra\)"):
        mvtec_ad_2(tree, "can")


@pytest.mark.parametrize(
    ("split", "missing"), [("train", "can: holds no train/good"), ("validation", "validation/good: no such folder")]
)
def test_a_missing_or_empty_folder_of_good_images_is_named(split: str, missing: str, tree: Path) -> None:
    good = tree / "can" / split / "good"
    for image in good.iterdir():
        image.unlink()
    with pytest.raises(InputError, match=rf"can/{split}/good: holds no images"):
        open_image_set(tree, "can")
    good.rmdir()
    with pytest.raises(InputError, match=missing):
        open_image_set(tree, "can")


def test_a_mask_without_the_suffix_is_none(tree: Path) -> None:
    masks = tree / "can/test_public/ground_truth/bad"
    (masks / "001_regular_mask.png").rename(masks / "001_regular.png")
    with pytest.raises(InputError, match=r"bad/001_regular\.png: has no mask; put 001_regular_mask\.png into .*bad$"):
        open_image_set(tree, "can")


def test_a_mask_of_another_size_is_named(tree: Path) -> None:
    Image.new("L", (20, 30), 255).save(tree / "can/test_public/ground_truth/bad/000_regular_mask.png")
    with pytest.raises(InputError, match=r"the mask is 20x30, its image 000_regular\.png 64x48"):
        ImageDataset(open_image_set(tree, "can").test, (48, 64))[0]


def test_without_any_masks_the_labels_stay(tree: Path) -> None:
    shutil.rmtree(tree / "can/test_public/ground_truth")
    images = open_image_set(tree, "can")
    assert (sum(s.label for s in images.test), images.has_masks) == (2, False)


def test_an_object_that_is_a_file_is_named(tree: Path) -> None:
    shutil.rmtree(tree / "rice")
    (tree / "rice").write_text("")
    with pytest.raises(InputError, match=r"rice: no folder; an object of MVTec AD 2 is a folder"):
        open_image_set(tree, "rice")
    with pytest.raises(InputError, match=r"rice: not a folder; unpack MVTec AD 2's rice there again"):
        private_images(tree, "rice")
    assert classes_of(tree) == ["can", "rice"]  # so that it is named where all are asked for
    (tree / "vial").symlink_to("nowhere")
    assert classes_of(tree) == ["can", "rice", "vial"]
    with pytest.raises(InputError, match=r"vial: no folder; an object of MVTec AD 2 is a folder"):
        open_image_set(tree, "vial")


def test_an_archive_that_was_unpacked_one_folder_too_deep_is_explained(tmp_path: Path) -> None:
    """The archive of one object holds a folder of its name."""
    root = tmp_path / "ad2"
    write_mvtec_ad_2(root / "can", objects=("can",))
    for take in (classes_of, open_image_set, lambda root: open_image_set(root, "can")):
        with pytest.raises(InputError, match=r"ad2/can: holds the object in one folder more, can/can; move that up"):
            take(root)
    assert open_image_set(root / "can").name == "can"  # the folder that the message names


def test_private_images_come_in_the_order_of_their_numbers(tree: Path) -> None:
    mixed = tree / "can/test_private_mixed"
    shutil.rmtree(mixed)
    mixed.mkdir()
    names = ["1_shift_1.png", "2_regular.png", "10_regular.png", "10_shift_2.png", "10_shift_10.png", "regular_3.png"]
    # A digit of another script is text.
    names.append("\u0663" + "1.png")
    for name in reversed(names):
        Image.new("L", (32, 32)).save(mixed / name)
    (mixed / "readme.txt").write_text("")
    found = private_images(tree, "can")
    assert [file.name for file in found["test_private_mixed"]] == names
    assert [file.name for file in found["test_private"]] == [f"{i:03}_regular.png" for i in range(3)]


def test_a_missing_empty_or_nested_private_split_is_one_line_that_names_it(tree: Path) -> None:
    split = tree / "can/test_private_mixed"
    (split / "deep").mkdir()
    (split / "000_regular.png").rename(split / "deep/000_regular.png")
    with pytest.raises(InputError, match=r"deep/000_regular\.png: the images of test_private_mixed lie in .*mixed"):
        private_images(tree, "can")
    shutil.rmtree(split)
    with pytest.raises(InputError, match=r"can/test_private_mixed: no such folder; unpack MVTec AD 2's can there"):
        private_images(tree, "can")
    split.mkdir()
    with pytest.raises(InputError, match=r"can/test_private_mixed: holds no images"):
        private_images(tree, "can")
    split.rmdir()
    split.write_text("")
    with pytest.raises(InputError, match=r"can/test_private_mixed: not a folder"):
        private_images(tree, "can")
    with pytest.raises(InputError, match=r"ad2/vial: no such folder"):
        private_images(tree, "vial")
