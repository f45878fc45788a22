"""The layout of BTAD, and what is wrong in a tree of it."""

import warnings
from pathlib import Path

import pytest
from PIL import Image

from fastmsflow import InputError
from fastmsflow.data import ImageDataset, btad, classes_of, open_image_set
from fastmsflow.errors import InputWarning


def write(path: Path, value: int = 100, size: tuple[int, int] = (40, 36)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, image, mask in (("01", "bmp", "png"), ("02", "png", "png"), ("03", "bmp", "bmp")):
        for folder in ("train/ok", "test/ok", "test/ko"):
            for stem in ("0000", "0001"):
                write(tmp_path / f"BTech/{name}/{folder}/{stem}.{image}")
        for stem in ("0000", "0001"):
            write(tmp_path / f"BTech/{name}/ground_truth/ko/{stem}.{mask}", 255)
    return tmp_path / "BTech"


@pytest.mark.parametrize("name", ["01", "02", "03"])
def test_ok_is_good_and_ko_defective_with_masks_of_either_format(name: str, tree: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = open_image_set(tree, name)
    assert (images.name, len(images.train), images.validation) == (name, 2, ())
    assert [(sample.kind, sample.label) for sample in images.test] == [("ko", 1)] * 2 + [("good", 0)] * 2
    assert images.has_masks
    assert ImageDataset(images.test, (36, 40))[0]["mask"].all()


def test_a_class_is_named_or_is_the_source_itself(tree: Path) -> None:
    assert classes_of(tree) == ["01", "02", "03"]
    assert open_image_set(tree / "02") == btad(tree, "02")
    with pytest.raises(InputError, match="name one with --class: 01, 02, 03"):
        open_image_set(tree)
    with pytest.raises(InputError, match=r"no class '04' \(there: 01, 02, 03\)"):
        open_image_set(tree, "04")
    (tree / "04").write_text("")
    with pytest.raises(InputError, match=r"no class '04' \(there: 01, 02, 03\)"):
        open_image_set(tree, "04")
    with pytest.raises(InputError, match="it is one class itself: leave the class out"):
        open_image_set(tree / "02", "02")


def test_a_missing_mask_an_empty_folder_and_other_images_are_told_of(tree: Path) -> None:
    write(tree / "01/extra/0.png")
    with pytest.warns(InputWarning, match=r"1 file looks like an image and is not read \(1 in extra\).*train/ok"):
        open_image_set(tree, "01")
    (tree / "01/ground_truth/ko/0001.png").unlink()
    with pytest.raises(InputError, match=r"ko/0001\.bmp: has no mask; put 0001\.png into .*ground_truth/ko"):
        open_image_set(tree, "01")
    for image in (tree / "02/train/ok").iterdir():
        image.unlink()
    with pytest.raises(InputError, match="02/train/ok: holds no images"):
        open_image_set(tree, "02")


def test_a_mask_of_another_size_is_named(tree: Path) -> None:
    write(tree / "03/ground_truth/ko/0000.bmp", 255, (20, 36))
    with pytest.raises(InputError, match=r"0000\.bmp: the mask is 20x36, its image 0000\.bmp 40x36"):
        ImageDataset(open_image_set(tree, "03").test, (36, 40))[0]
