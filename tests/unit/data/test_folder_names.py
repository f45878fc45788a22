"""Folders whose names say that not all images below are good ones are refused, and plain folders are not."""

import io
from pathlib import Path

import pytest
from PIL import Image

from fastmsflow import InputError
from fastmsflow.data import folder, list_images, open_image_set
from fastmsflow.data.file_search import find_images
from fastmsflow.data.folder_names import kind_of_folder
from fastmsflow.errors import InputWarning


def tree(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name / "1.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (40, 36), 255).save(path)
    return root


@pytest.mark.parametrize(
    ("names", "called"),
    [
        (("good", "bad", "mask", "ground_truth/bad"), "good"),
        (("OK", "NG"), "OK"),
        (("ok", "ng_scratch"), "ok"),
        (("2024/Good", "2024/Bad"), "2024/Good"),
        (("cam1/normal", "cam2/Anomaly"), "cam1/normal"),
        (("GoodParts", "DefectImages"), "GoodParts"),
        (("not ok", "ok 1"), "ok 1"),
        (("good", "dent", "scratch"), "good"),
        (("no_defect", "defect"), "no_defect"),
        (("train2/good", "test2/good"), "train2/good"),
        (("Train/good", "Test/good", "Test/dent"), "Train/good"),
        (("01/test/ok", "01/test/nok", "01/train/ok"), "01/train/ok"),
        (("train_good", "test_bad"), "train_good"),
        (("inliers", "outliers"), "inliers"),
    ],
)  # fmt: skip
def test_good_images_beside_others_are_not_all_learned_from(
    names: tuple[str, ...], called: str, tmp_path: Path
) -> None:
    tree(tmp_path, *names)
    with pytest.raises(InputError, match="all images below it would be taken for good ones") as caught:
        open_image_set(tmp_path)
    assert f"name the folder of good images, {tmp_path / called}, or lay" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="all images below it would be taken for good ones"):
        folder(tmp_path)
    # Whatever is to be scored may lie in such folders.
    assert len(list_images(tmp_path)) == len(find_images([str(tmp_path)], io.BytesIO()).files) == len(names)
    assert len(open_image_set(tmp_path / called).train) == 1


@pytest.mark.parametrize(
    "names",
    [
        ("1", "Bad"),
        ("images", "masks"),
        ("a/ground truth", "a/x"),
        ("mine", "Test"),
        ("a", "validation"),
        ("images", "labels"),
    ],
)
def test_defects_masks_and_tests_are_not_learned_from(names: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name the folder of good images alone, or lay"):
        open_image_set(tree(tmp_path, *names))


@pytest.mark.parametrize(
    "names",
    [
        ("2024-01-05", "2024-01-06"), ("cam1/left", "cam1/right", "cam2"), ("good",), ("cam1/good", "cam2/good"),
        ("good/monday", "good/tuesday"), ("Line 3", "line4", "."), ("ok", "good"), ("maskless", "latest", "goodyear"),
        ("train",), ("a_very_bad_light",), ("normal_light", "test_bench_2"),
    ],
)  # fmt: skip
def test_plain_folders_are_learned_from(names: tuple[str, ...], tmp_path: Path) -> None:
    assert len(open_image_set(tree(tmp_path, *names)).train) == len(names)


def test_folders_without_images_count_for_nothing(tmp_path: Path) -> None:
    (tree(tmp_path, "a") / "bad").mkdir()
    assert len(open_image_set(tmp_path).train) == 1


@pytest.mark.parametrize("name", ["OK", "Good", "normal", "GOOD", "ok_images"])
def test_the_folder_of_good_test_images_must_be_called_good(name: str, tmp_path: Path) -> None:
    tree(tmp_path, "train/good", f"test/{name}", "test/dent", "ground_truth/dent")
    with pytest.raises(InputError, match=f"test/{name}: the folder of good test images must be called good; rename it"):
        open_image_set(tmp_path)
    (tmp_path / "train/good").rename(tmp_path / "train/x")
    with pytest.raises(InputError, match=f"test/{name}: the folder of good test images must be called good; rename it"):
        open_image_set(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train/OK", "train/NG", "test/good"), "holds folders called NG; OK; name the folder of good images"),
        (("train/good/bad", "test/good"), "train/good: all images below it would be taken for good ones"),
        (("train/good", "test/dent/good"), "all images below .*test/dent are taken for defective ones"),
        (("train/good", "test/good/NG"), "all images below .*test/good are taken for good ones"),
        (("train/good", "test/masks"), "test/masks: holds masks by its name"),
        (("train/good", "test/dent/mask"), "test/dent/mask: all images below"),
    ],
)
def test_folders_within_a_layout_are_looked_at_too(names: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        open_image_set(tree(tmp_path, *names))


def test_names_are_recognized_in_all_spellings() -> None:
    for name in ("GroundTruth", "ground-truth", "Ground Truth 2", "GT", "masks_01"):
        assert kind_of_folder(name) == "mask"
    for name in ("NG", "ng2", "N.G.".replace(".", ""), "not-OK", "NonGood", "anomalous parts", "Defects"):
        assert kind_of_folder(name) == "defective"
    for name in ("", "1", "日付", "contest", "okra", "masking tape"):
        assert kind_of_folder(name) is None


@pytest.mark.parametrize("names", [("0", "1"), ("gut", "schlecht"), ("crack", "no crack")])
@pytest.mark.parametrize("below", ["", "train/"])
def test_folders_whose_names_say_nothing_are_learned_from_and_told(
    below: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    tree(tmp_path, *(f"{below}{name}" for name in names))
    with pytest.warns(InputWarning, match=f"in folders {'; '.join(names)}, are taken for good ones; if some are not"):
        assert len(open_image_set(tmp_path).train) == 2
