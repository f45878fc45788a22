"""The layout of Real-IAD, whose tables a stranger may have written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastmsflow import InputError
from fastmsflow.data import ImageDataset, classes_of, open_image_set, real_iad

TABLE = "realiad_jsons/realiad_jsons/usb.json"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    good, bad = "OK/S0001/usb_OK_C1.jpg", "NG/HS/S0002/usb_HS_C1.jpg"
    mask = bad.replace(".jpg", ".png")
    train = [_entry("OK", good), _entry("OK", good.replace("C1", "C2"))]
    test = [_entry("OK", good.replace("C1", "C3")), _entry("HS", bad, mask), _entry("AK", bad.replace("C1", "C2"))]
    for entry in (*train, *test):
        for name, value in ((entry["image_path"], 100), (entry["mask_path"], 255)):
            if name:
                path = tmp_path / "realiad_1024/usb" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (40, 36), value).save(path)
    table = tmp_path / TABLE
    table.parent.mkdir(parents=True)
    meta = {"normal_class": "OK", "prefix": "usb/", "pre_transform": None}
    table.write_text(json.dumps({"meta": meta, "train": train, "test": test}))
    return tmp_path


def _entry(kind: str, image: str, mask: str | None = None) -> dict[str, Any]:
    return {"category": "usb", "anomaly_class": kind, "image_path": image, "mask_path": mask}


def test_the_table_names_splits_kinds_and_masks(tree: Path) -> None:
    assert classes_of(tree) == ["usb"]
    images = open_image_set(tree)
    assert images == real_iad(tree, "usb")
    assert (images.name, len(images.train), images.validation) == ("usb", 2, ())
    assert [(sample.kind, sample.label) for sample in images.test] == [("good", 0), ("HS", 1), ("AK", 1)]
    assert not images.has_masks  # the last one's place is not known
    items = ImageDataset(images.test[:2], (36, 40))
    assert [bool(items[i]["mask"].all()) for i in range(2)] == [False, True]


def test_tables_may_lie_in_one_folder_and_images_at_another_resolution(tree: Path) -> None:
    (tree / TABLE).rename(tree / "realiad_jsons/usb.json")
    (tree / "realiad_jsons/realiad_jsons").rmdir()
    (tree / "realiad_1024").rename(tree / "realiad_256")
    assert open_image_set(tree, "usb").train[0].image.is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["meta"].update(prefix="../usb/"), r"usb\.json: the path \.\./usb/ leads out of .*realiad_1024;"),
        (lambda t: t["train"][0].update(image_path="/etc/hosts"), r"the path /etc/hosts leads out of .*usb; copy it"),
        (lambda t: t["test"][1].update(mask_path="NG/../../../x.png"), r"the path NG/\.\./\.\./\.\./x\.png leads out"),
        (lambda t: t["train"][0].update(image_path="a\0b"), r"the path a.x00b leads out"),
        (lambda t: t["train"].append(t["test"][1]), r"usb_HS_C1\.jpg is defective and in train; copy it again"),
        (lambda t: t.update(train=[]), "names no images to train on"),
        (lambda t: t.pop("test"), r"usb\.json: no table of Real-IAD \(test is missing\); copy it again"),
        (lambda t: t["test"][0].update(anomaly_class=3), r"\(test\[0\]\.anomaly_class is 3, not text\)"),
        (lambda t: t["meta"].update(prefix="zipper"), r"realiad_1024/zipper: no such folder; unpack the images of usb"),
    ],
    ids=["prefix", "absolute", "mask", "NUL", "defective in train", "empty", "no test", "a number", "no folder"],
)
def test_a_bad_table_is_one_line(change: Callable[[dict[str, Any]], None], message: str, tree: Path) -> None:
    table = json.loads((tree / TABLE).read_text())
    change(table)
    (tree / TABLE).write_text(json.dumps(table))
    with pytest.raises(InputError, match=message) as caught:
        open_image_set(tree, "usb")
    assert "\n" not in str(caught.value) and "\0" not in str(caught.value)


def test_a_table_that_is_no_json_missing_images_and_an_unknown_class_are_named(tree: Path) -> None:
    with pytest.raises(InputError, match=r"no class 'usb_adaptor' \(there: usb\)"):
        open_image_set(tree, "usb_adaptor")
    (tree / TABLE).write_bytes(b"\xff{")
    with pytest.raises(InputError, match=r"usb\.json: no table of Real-IAD \(not JSON: "):
        open_image_set(tree, "usb")
    (tree / "realiad_1024").rename(tree / "elsewhere")
    (tree / TABLE).write_text('{"meta": {"normal_class": "OK", "prefix": ""}, "train": [], "test": []}')
    with pytest.raises(InputError, match=r"holds realiad_jsons but no images; unpack them into .*realiad_1024"):
        open_image_set(tree, "usb")
    (tree / TABLE).unlink()
    with pytest.raises(InputError, match="holds no classes"):
        open_image_set(tree)


def test_an_image_that_is_missing_is_named_when_it_is_read(tree: Path) -> None:
    images = open_image_set(tree, "usb")
    images.train[0].image.unlink()
    with pytest.raises(InputError, match=r"usb_OK_C1\.jpg"):
        ImageDataset(images.train, (36, 40))[0]
