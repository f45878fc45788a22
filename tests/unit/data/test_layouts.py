"""Folders as users have them -> image sets."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from fastmsflow import InputError
from fastmsflow.data import ImageDataset, categories, folder, layouts, mvtec, open_image_set, visa
from fastmsflow.data.file_search import find_images
from fastmsflow.data.layouts import classes_of


def image(path: Path, size: tuple[int, int] = (40, 36), value: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)
    return path


def mvtec_class(root: Path, name: str, with_masks: bool = True, mask_suffix: str = "_mask") -> None:
    for stem in ("000", "001"):
        image(root / name / f"train/good/{stem}.png")
    image(root / name / "test/good/000.png")
    for kind in ("crack", "stain"):
        image(root / name / f"test/{kind}/000.png")
        if with_masks:
            image(root / name / f"ground_truth/{kind}/000{mask_suffix}.png", value=255)


@pytest.fixture
def visa_root(tmp_path: Path) -> Path:
    rows = ["object,split,label,image,mask"]
    for name in ("candle", "pcb1"):
        base = f"{name}/Data"
        for split, label, stem in (("train", "normal", "0"), ("test", "normal", "1"), ("test", "anomaly", "2")):
            kind = "Normal" if label == "normal" else "Anomaly"
            picture = f"{base}/Images/{kind}/{stem}.JPG"
            mask = f"{base}/Masks/Anomaly/{stem}.png" if label == "anomaly" else ""
            image(tmp_path / picture)
            if mask:
                image(tmp_path / mask, value=2)  # VisA numbers its defects
            rows.append(f"{name},{split},{label},{picture},{mask}")
    (tmp_path / "split_csv").mkdir()
    (tmp_path / "split_csv/1cls.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


@pytest.mark.parametrize("mask_suffix", ["_mask", ""], ids=["STEM_mask.png", "STEM.png"])
def test_mvtec_layout(mask_suffix: str, tmp_path: Path) -> None:
    mvtec_class(tmp_path, "bottle", mask_suffix=mask_suffix)
    images = mvtec(tmp_path, "bottle")
    assert (images.name, len(images.train), len(images.test)) == ("bottle", 2, 3)
    assert [(s.kind, s.label) for s in images.test] == [("crack", 1), ("good", 0), ("stain", 1)]
    assert images.has_masks
    assert images.image_size == (512, 512)


def test_transistor_is_trained_at_256(tmp_path: Path) -> None:
    mvtec_class(tmp_path, "transistor")
    assert mvtec(tmp_path, "transistor").image_size == (256, 256)


def test_a_set_without_masks_still_has_labels(tmp_path: Path) -> None:
    mvtec_class(tmp_path, "bottle", with_masks=False)
    images = mvtec(tmp_path, "bottle")
    assert not images.has_masks
    assert sum(sample.label for sample in images.test) == 2


def test_one_missing_mask_is_named(tmp_path: Path) -> None:
    mvtec_class(tmp_path, "bottle")
    (tmp_path / "bottle/ground_truth/crack/000_mask.png").unlink()
    with pytest.raises(InputError, match=r"crack/000\.png: has no mask; put 000_mask\.png"):
        mvtec(tmp_path, "bottle")


def test_a_mask_of_another_size_or_that_would_mark_nothing_is_named_on_loading(tmp_path: Path) -> None:
    mvtec_class(tmp_path, "bottle")
    mask = image(tmp_path / "bottle/ground_truth/crack/000_mask.png", value=1)
    first = ImageDataset(mvtec(tmp_path, "bottle").test, (36, 40))
    assert first[0]["mask"].all()  # a mask of 1 is as good as one of 255
    Image.fromarray(np.arange(36 * 40, dtype=np.uint8).reshape(36, 40) % 3).save(mask)
    with pytest.raises(InputError, match=r"crack/000_mask\.png: the mask's values go up to 2"):
        first[0]
    image(mask, size=(20, 36), value=255)
    with pytest.raises(InputError, match=r"crack/000_mask\.png: the mask is 20x36, its image 000\.png 40x36"):
        first[0]


def test_a_broken_link_among_training_images_is_named_not_passed_over(tmp_path: Path) -> None:
    mvtec_class(tmp_path, "bottle")
    (tmp_path / "bottle/train/good/002.png").symlink_to("nowhere.png")
    train = mvtec(tmp_path, "bottle").train
    assert len(train) == 3
    with pytest.raises(InputError, match=r"002\.png: a link to a file that is not there"):
        ImageDataset(train, (36, 40))[2]


def test_an_unknown_class_lists_those_there_and_guesses(tmp_path: Path) -> None:
    mvtec_class(tmp_path, "bottle")
    mvtec_class(tmp_path, "cable")
    with pytest.raises(InputError, match=r"there: bottle, cable\); did you mean bottle\?"):
        mvtec(tmp_path, "botle")


def test_an_empty_class_is_named(tmp_path: Path) -> None:
    (tmp_path / "bottle/train/good").mkdir(parents=True)
    with pytest.raises(InputError, match="train/good: holds no images"):
        mvtec(tmp_path, "bottle")


def test_visa_as_published(visa_root: Path) -> None:
    assert categories(visa_root) == ["candle", "pcb1"]
    images = visa(visa_root, "pcb1")
    assert (len(images.train), [s.label for s in images.test]) == (1, [0, 1])
    assert images.has_masks
    item = ImageDataset(images.test, (36, 40))[1]
    assert item["mask"].all()  # value 2 counts as defective
    with pytest.raises(InputError, match="did you mean candle"):
        visa(visa_root, "candles")


def test_visa_rearranged_is_read_as_mvtec(tmp_path: Path) -> None:
    image(tmp_path / "candle/train/good/0.JPG")
    image(tmp_path / "candle/test/good/1.JPG")
    image(tmp_path / "candle/test/bad/2.JPG")
    image(tmp_path / "candle/ground_truth/bad/2.png")
    images = visa(tmp_path, "candle")
    assert images.has_masks
    assert [s.label for s in images.test] == [1, 0]


def test_visa_with_other_columns_says_which_are_needed(visa_root: Path) -> None:
    (visa_root / "split_csv/1cls.csv").write_text("object,image\npcb1,x.png\n")
    with pytest.raises(InputError, match="needs the columns image, label, mask, object, split"):
        visa(visa_root, "pcb1")


def test_visa_with_an_unknown_split_names_the_row(visa_root: Path) -> None:
    rows = (visa_root / "split_csv/1cls.csv").read_text().replace("pcb1,test,normal", "pcb1,val,normal")
    (visa_root / "split_csv/1cls.csv").write_text(rows)
    with pytest.raises(InputError, match=r"split 'val', label 'normal' of pcb1/Data/Images/Normal/1\.JPG"):
        visa(visa_root, "pcb1")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"object,split,label,image,mask\npcb1,train\n", "a row of 'pcb1' names no image"),
        (b"object,split,label,image,mask\npcb1,train,anomaly,a.png,\n", "a.png is an anomaly in train"),
        (b"object,split,label,image,mask\n\xff\xfe,train,normal,a.png,\n", "not CSV in UTF-8"),
    ],
    ids=["short row", "anomaly in train", "not UTF-8"],
)
def test_a_bad_visa_split_is_one_line_that_names_it(content: bytes, message: str, visa_root: Path) -> None:
    (visa_root / "split_csv/1cls.csv").write_bytes(content)
    with pytest.raises(InputError, match=message):
        visa(visa_root, "pcb1")


def test_visa_with_a_byte_order_mark_is_read(visa_root: Path) -> None:
    split = visa_root / "split_csv/1cls.csv"
    split.write_text(split.read_text(), encoding="utf-8-sig")
    assert len(visa(visa_root, "pcb1").train) == 1


def test_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    mvtec_class(tmp_path, "bottle")
    mvtec_class(tmp_path, ".bottle.partial")
    assert categories(tmp_path) == ["bottle"]


def test_masks_keep_the_folders_below_a_kind(tmp_path: Path) -> None:
    image(tmp_path / "mine/1.png")
    for part in ("left", "right"):
        image(tmp_path / f"check/dent/{part}/4.png")
        image(tmp_path / f"masks/dent/{part}/4.png")
    images = folder(tmp_path / "mine", tmp_path / "check", tmp_path / "masks")
    assert [s.mask for s in images.test] == [tmp_path / f"masks/dent/{part}/4.png" for part in ("left", "right")]


def test_any_folder_with_tests_and_masks(tmp_path: Path) -> None:
    image(tmp_path / "mine/a/1.png")
    image(tmp_path / "mine/2.jpg")
    image(tmp_path / "check/good/3.png")
    image(tmp_path / "check/dent/4.png")
    image(tmp_path / "masks/dent/4.png")
    images = folder(tmp_path / "mine", tmp_path / "check", tmp_path / "masks")
    assert (images.name, len(images.train), len(images.test), images.has_masks) == ("mine", 2, 2, True)


def test_a_plain_class_keeps_its_test_images_out_of_training(tmp_path: Path) -> None:
    image(tmp_path / "part/test/dent/2.png")
    with pytest.raises(InputError, match="no train folder"):
        open_image_set(tmp_path / "part")
    image(tmp_path / "part/train/1.png")
    images = open_image_set(tmp_path / "part")
    assert (images.name, len(images.train), len(images.test), images.has_masks) == ("part", 1, 1, False)
    image(tmp_path / "part/ground_truth/dent/2.png")
    assert open_image_set(tmp_path / "part").has_masks
    with pytest.raises(InputError, match="name the test folder too"):
        folder(tmp_path / "part/train", masks=tmp_path / "part/ground_truth")


def test_a_flat_test_folder_is_explained(tmp_path: Path) -> None:
    image(tmp_path / "mine/1.png")
    image(tmp_path / "check/2.png")
    with pytest.raises(InputError, match="no folders by kind of defect"):
        folder(tmp_path / "mine", tmp_path / "check")


def test_open_finds_the_layout(tmp_path: Path, visa_root: Path) -> None:
    assert open_image_set(visa_root, "candle").name == "candle"
    sets = tmp_path / "sets"
    mvtec_class(sets, "bottle")
    assert open_image_set(sets).name == "bottle"  # the only class
    assert open_image_set(sets / "bottle").name == "bottle"  # the class itself
    assert len(open_image_set(sets / "bottle/train/good").train) == 2  # just images
    mvtec_class(sets, "cable")
    with pytest.raises(InputError, match="name one with --class: bottle, cable"):
        open_image_set(sets)
    assert open_image_set(sets, "cable").name == "cable"
    with pytest.raises(InputError, match="no such folder, and not a sample set"):
        open_image_set(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"000\.png: not a folder; give the folder that the images are in"):
        open_image_set(sets / "bottle/train/good/000.png")
    assert len(open_image_set("elpv").train) == 471


def test_the_dataset_goes_through_loader_workers(tmp_path: Path) -> None:
    mvtec_class(tmp_path, "bottle")
    test = mvtec(tmp_path, "bottle").test
    for workers in (0, 2):
        (batch,) = DataLoader(ImageDataset(test, (36, 48)), batch_size=4, num_workers=workers)
        assert batch["image"].shape == (3, 3, 36, 48)
        assert batch["mask"].dtype == torch.bool
        assert batch["mask"].flatten(1).any(dim=1).tolist() == [True, False, True]
        assert batch["label"].tolist() == [1, 0, 1]
        assert batch["index"].tolist() == [0, 1, 2]
    assert np.isclose(batch["image"].mean(), 100 / 255)


def test_a_folder_that_is_one_class_says_so_where_a_class_is_named(mvtec: Path) -> None:
    with pytest.raises(InputError, match=r"no class 'tile' .*; it is one class itself: leave the class out"):
        open_image_set(mvtec / "tile", "tile")


def test_every_layout_is_registered_and_has_a_file_of_its_name() -> None:
    names = {layout.name for layout in layouts.LAYOUTS}
    files = {path.stem for path in Path(layouts.__file__).parent.glob("*.py")}
    assert names == files - {"__init__", "layout"}


def test_a_visa_table_without_rows_is_named(visa_root: Path) -> None:
    (visa_root / "split_csv/1cls.csv").write_text("object,split,label,image,mask\n")
    with pytest.raises(InputError, match="holds no classes"):
        open_image_set(visa_root)


def test_an_empty_name_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell gives one for a variable that is not set."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("mine.png")
    for take in (open_image_set, classes_of, lambda name: find_images([name], io.BytesIO())):
        with pytest.raises(InputError, match=r"^a name is empty, as that of a variable that is not set"):
            take("")
