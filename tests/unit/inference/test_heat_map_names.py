"""Names of the heat maps that ``predict`` writes: each tells whose it is, and none is written over."""

import csv
import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from fastmsflow import MSFlow
from fastmsflow.files import LONGEST_NAME
from fastmsflow.inference.heat_map_names import HEAT_MAP, heat_map_names
from tests.helpers.folder_listing import names_in

SHADES = {"test/bent/000.png": 0, "test/good/000.png": 128, "train/good/000.png": 255, "test/good/001.png": 64}


def names_of(*images: str) -> list[str]:
    """Without what all of them end with."""
    names = heat_map_names([Path(image) for image in images])
    assert all(name.endswith(HEAT_MAP) for name in names)
    return [name.removesuffix(HEAT_MAP) for name in names]


@pytest.mark.parametrize(
    ("images", "names"),
    [
        (["good/000.png", "bent/001.png"], ["000", "001"]),
        (["d/bent/000.png", "d/good/000.png", "d/good/001.png"], ["bent_000", "good_000", "001"]),
        (["a/good/0.png", "b/good/0.png", "b/bent/0.png"], ["a_good_0", "b_good_0", "b_bent_0"]),
        (["/0.png", "/a/0.png", "/b/a/0.png"], ["0", "a_0", "b_a_0"]),
        (["x/../a/0.png", "./b/0.png", "a/../c/0.png"], ["a_0", "b_0", "c_0"]),
        (["a/0.png", "a/0.jpg"], ["0.png", "0.jpg"]),
        (["a/0.png", "a/0.jpg", "b/0.png"], ["a_0.png", "a_0.jpg", "b_0"]),
        (["A/0.png", "a/0.png"], ["A_0", "a_0_2"]),
        (["a/good_0.png", "good/0.png", "bent/0.png"], ["good_0", "good_0_2", "bent_0"]),
        (["a/0.png", "b/0.png", "c/a_0_2.png", "d/a_0.png"], ["a_0_3", "b_0", "a_0_2", "a_0"]),
        (["a/x\n0.png", "b/x\r0.png"], ["a_x_0", "b_x_0"]),
        (["a/0.png", "a/0.png"], ["0.png", "0.png_2"]),
        (["a/\u00e9.png", "b/e\u0301.png"], ["a_\u00e9", "b_e\u0301"]),
    ],
    ids=str,
)
def test_images_of_one_name_keep_the_folders_that_tell_them_apart(images: list[str], names: list[str]) -> None:
    assert names_of(*images) == names


def test_relative_and_absolute_names_of_the_same_folders_are_told_apart(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert names_of(f"{tmp_path}/good/0.png", "bent/0.png", "../0.png") == [
        "good_0",
        "bent_0",
        f"{tmp_path.parent.name}_0",
    ]


@pytest.mark.parametrize("letter", ["n", "é"])
def test_long_names_keep_their_folder_and_stay_apart(letter: str) -> None:
    long = letter * (240 // len(letter.encode()))
    by_folder = names_of(f"good/{long}.png", f"bent/{long}.png")
    assert [name[:5] for name in by_folder] == ["good_", "bent_"]
    cut = names_of(*(f"a/{long}{i:06}.png" for i in range(30)))
    assert len(set(cut)) == 30
    longest = max(len((name + HEAT_MAP).encode()) for name in (*by_folder, *cut))
    assert LONGEST_NAME - 1 <= longest <= LONGEST_NAME


PARTS = st.sampled_from(
    ["a", "A", "b", "a_b", "good", "..", "a\n", "a\r", "\udce9", "ß", "ss", "İ", "é", "n" * 246, "N" * 246, "n" * 250]
)
IMAGES = st.builds(
    lambda root, folders, stem, suffix: Path(root + "/".join([*folders, stem + suffix])),
    st.sampled_from(["", "/", f"{Path.cwd()}/"]),
    st.lists(PARTS, max_size=4),
    PARTS.filter(lambda part: part != "..") | st.sampled_from(["a_2", "a_a", "good_a", "a_b_a", ".a"]),
    st.sampled_from(["", ".png", ".PNG", ".jpg", ".a.png"]),
)


def absolute(image: Path) -> Path:
    return Path(os.path.abspath(image))  # noqa: PTH100 - links stay what they are


def printable(text: str) -> str:
    return "".join(c if c.isprintable() else "_" for c in text)


@given(st.lists(IMAGES, min_size=1, max_size=12), st.randoms(use_true_random=False))
@example([Path(f"a/{'n' * 240}{i}.png") for i in range(12)], random.Random(0))
def test_every_image_has_a_name_of_its_own_whatever_the_order(images: list[Path], shuffler: random.Random) -> None:
    names = heat_map_names(images)
    assert len(names) == len(images)
    assert len({name.casefold() for name in names}) == len(images)
    for name in names:
        assert name.endswith(HEAT_MAP) and name.isprintable() and "/" not in name
        assert len(os.fsencode(name)) <= LONGEST_NAME
    # Those of one file under several names are as good as each other.
    by_file: dict[Path, set[str]] = {}
    for image, name in zip(images, names, strict=True):
        by_file.setdefault(absolute(image), set()).add(name)
    shuffled = shuffler.sample(images, len(images))
    again: dict[Path, set[str]] = {}
    for image, name in zip(shuffled, heat_map_names(shuffled), strict=True):
        again.setdefault(absolute(image), set()).add(name)
    assert again == by_file


@given(st.lists(IMAGES, min_size=1, max_size=12))
def test_a_name_shows_the_folder_where_others_have_the_same_stem_and_only_there(images: list[Path]) -> None:
    paths = [absolute(image) for image in images]
    for path, name in zip(paths, heat_map_names(images), strict=True):
        stem = printable(path.stem)
        if len(name.encode()) > LONGEST_NAME - 10:
            continue  # it may have been cut
        same = {p.parent for p in paths if printable(p.stem).casefold() == stem.casefold()}
        if len(same) > 1 and path.parent != Path("/"):
            assert f"{printable(path.parent.name)}_{stem}" in name
        elif sum(printable(p.stem).casefold() == stem.casefold() for p in paths) == 1:
            assert name == stem + HEAT_MAP


@pytest.mark.parametrize("given_in", ["as folders", "backwards, through a link"])
def test_the_table_names_the_picture_of_each_image_of_an_mvtec_layout(given_in: str, predict, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MSFlow("test_efficientnet", pretrained=False, image_size=(64, 64), blocks=(1, 1, 1))
    model.save(tmp_path / "model.safetensors")
    for name, shade in SHADES.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (shade,) * 3).save(tmp_path / "set" / name)
    (tmp_path / "link").symlink_to("set")
    if given_in == "as folders":
        sources = [tmp_path / "set/test", tmp_path / "set/train"]
    else:
        sources = [tmp_path / "link" / name for name in reversed(SHADES)]
    out = tmp_path / "out"
    code, _, err = predict(tmp_path / "model.safetensors", *sources, "--out", out, "--batch-size", 3)
    assert (code, err) == (0, "")
    with (out / "scores.csv").open(newline="") as file:
        maps = {row["image"]: row["heat_map"] for row in csv.DictReader(file)}
    root = sources[0].parents[0] if given_in == "as folders" else tmp_path / "link"
    assert maps == {
        str(root / "test/bent/000.png"): "test_bent_000_heatmap.png",
        str(root / "test/good/000.png"): "test_good_000_heatmap.png",
        str(root / "train/good/000.png"): "train_good_000_heatmap.png",
        str(root / "test/good/001.png"): "001_heatmap.png",
    }
    assert names_in(out) == {"scores.csv", *maps.values()}
    for name, shade in SHADES.items():
        with Image.open(out / maps[str(root / name)]) as picture:
            # The image stands in the left half.
            assert picture.convert("RGB").getpixel((picture.width // 4, picture.height // 2)) == (shade,) * 3
