"""The record of the files that a verb wrote into a folder names those alone, whatever a stranger makes of it."""

import json
import os
from pathlib import Path

import pytest

from fastmsflow.owned_files import RECORD_FILE, owned_files, record_files


def test_the_record_names_what_each_verb_wrote_last(tmp_path: Path) -> None:
    for name in ("scores.csv", "a_heatmap.png", "metrics.json", "mine.png"):
        (tmp_path / name).write_text(name)
    record_files(tmp_path, "predict", {"scores.csv": 10, "a_heatmap.png": 13})
    record_files(tmp_path, "evaluate", {"metrics.json": 12})
    assert owned_files(tmp_path) == {"scores.csv", "a_heatmap.png", "metrics.json"}
    assert owned_files(tmp_path, "predict") == {"scores.csv", "a_heatmap.png"}
    record_files(tmp_path, "predict", {"scores.csv": 10})
    assert owned_files(tmp_path) == {"scores.csv", "metrics.json"}


def test_a_file_that_somebody_changed_or_removed_is_not_named(tmp_path: Path) -> None:
    for name in ("a_heatmap.png", "b_heatmap.png", "c_heatmap.png"):
        (tmp_path / name).write_text(name)
    record_files(tmp_path, "predict", dict.fromkeys(("a_heatmap.png", "b_heatmap.png", "c_heatmap.png"), 13))
    (tmp_path / "a_heatmap.png").write_text("a picture of mine")
    (tmp_path / "b_heatmap.png").unlink()
    assert owned_files(tmp_path) == {"c_heatmap.png"}


def test_a_file_whose_size_is_not_known_yet_is_named_once_it_is_there(tmp_path: Path) -> None:
    record_files(tmp_path, "train", {"training.png": None, "logs/metrics.csv": None})
    assert owned_files(tmp_path) == set()
    (tmp_path / "training.png").write_text("curves")
    assert owned_files(tmp_path) == {"training.png"}


def test_files_behind_links_are_not_named(tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    (out / "brick").mkdir(parents=True)
    elsewhere.mkdir()
    for name in ("scores.csv", "brick/scores.csv"):
        (out / name).write_text("1")
    record_files(out, "evaluate", {"scores.csv": 1, "brick/scores.csv": 1})
    assert owned_files(out) == {"scores.csv", "brick/scores.csv"}
    for name in ("scores.csv", "brick"):
        (out / name).rename(elsewhere / name)
        (out / name).symlink_to(elsewhere / name)
    assert owned_files(out) == set()


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "[" * 9999, '{"format": "fastmsflow files 1"}', '{"format": "fastmsflow files 1", "files": 5}',
        '{"format": "another", "files": {"a_heatmap.png": ["predict", null]}}', "1" * 10_000, "\xff",
    ],
    ids=["empty", "cut off", "list", "nested", "no files", "number", "another format", "huge number", "not UTF-8"],
)  # fmt: skip
def test_a_damaged_record_names_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / "a_heatmap.png").touch()
    (tmp_path / RECORD_FILE).write_bytes(content.encode("latin-1"))
    assert owned_files(tmp_path) == set()


@pytest.mark.parametrize(
    "name",
    [
        "../mine.png",
        "/etc/passwd",
        "a/../../mine.png",
        "",
        ".",
        "a//b_heatmap.png",
        "./a_heatmap.png",
        "a\0b",
        "\ud800",
    ],
)
def test_a_stranger_s_record_does_not_lead_out_of_the_folder(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for path in (tmp_path / "mine.png", out / "a_heatmap.png"):
        path.touch()
    files = {
        name: ["predict", None],
        "a_heatmap.png": ["predict", 0],
        "b_heatmap.png": 5,
        "c_heatmap.png": ["predict"],
        "d_heatmap.png": [1, 1],
    }
    (out / RECORD_FILE).write_text(json.dumps({"format": "fastmsflow files 1", "files": files}))
    assert owned_files(out) == {"a_heatmap.png"}


@pytest.mark.parametrize("name", ["00.png", "photo_heatmap.jpg", "my_scores.png", "thesis.docx", "a/key", ".bashrc"])
def test_a_stranger_s_record_names_no_file_that_this_product_does_not_write(name: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / name).write_text("mine")
    (tmp_path / "scores.csv").write_text("a table")
    files = {each: ["predict", None] for each in (name, "scores.csv")}
    (tmp_path / ".fastmsflow.json").write_text(json.dumps({"format": "fastmsflow files 1", "files": files}))
    assert owned_files(tmp_path) == {"scores.csv"}


def test_a_record_that_is_a_pipe_or_a_link_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / RECORD_FILE)
    assert owned_files(tmp_path) == set()
    (tmp_path / RECORD_FILE).unlink()
    (tmp_path / RECORD_FILE).symlink_to("/dev/zero")
    assert owned_files(tmp_path) == set()


def test_a_record_of_a_file_that_lies_too_deep_is_not_believed(tmp_path: Path) -> None:
    entries = {"a/" * 3000 + "b_heatmap.png": ["predict", 0], "mine_heatmap.png": ["predict", 1]}
    (tmp_path / "mine_heatmap.png").write_text("1")
    (tmp_path / RECORD_FILE).write_text(json.dumps({"format": "fastmsflow files 1", "files": entries}))
    assert owned_files(tmp_path) == {"mine_heatmap.png"}
