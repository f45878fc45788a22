"""Verbs write into a folder one process at a time, replace what they wrote themselves, and leave all else alone."""

import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from fastmsflow.files import claimed_folder
from fastmsflow.models.checkpoint import read_config
from fastmsflow.owned_files import owned_files
from tests.helpers.folder_listing import files_in, names_in
from tests.helpers.paths import ROOT
from tests.helpers.predictions import Command, table_rows

TRAIN = ("--batch-size", 4, "--image-size", 64, "--meta-epochs", 1, "--sub-epochs", 1)
VERBS = {
    "predict": ("predict", "MODEL", "IMAGES"),
    "predict, as JSON lines": ("predict", "MODEL", "IMAGES", "--format", "jsonl", "--no-heat-maps"),
    "predict, as Parquet": ("predict", "MODEL", "IMAGES", "--format", "parquet", "--workers", 0),
    "evaluate": ("evaluate", "MODEL", "SET", "--class", "tile"),
    "shard": ("shard", "IMAGES"),
    "train": ("train", "SET", "--class", "tile", *TRAIN),
}


@pytest.fixture
def arguments(brick_checkpoint: Path, brick_tiles: Path, mvtec: Path) -> dict[str, tuple[object, ...]]:
    """VERBS on real files."""
    places = {"MODEL": brick_checkpoint, "IMAGES": brick_tiles, "SET": mvtec}
    return {verb: tuple(places.get(str(word), word) for word in words) for verb, words in VERBS.items()}


@pytest.mark.usefixtures("no_downloads")
@pytest.mark.parametrize("verb", VERBS)
def test_a_second_process_in_a_folder_is_refused(verb: str, arguments, command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with claimed_folder(out):
        (out / "scores.csv").write_text("of the first process")
        code, said = command(*arguments[verb], "--out", out)
        assert code == 1
        line = f"fastmsflow: {out}: another process is writing there; choose another folder, or wait for it"
        assert said.splitlines()[-1] == f"{line} (it has locked {out / '.lock'})"
        assert files_in(out) == {"scores.csv": b"of the first process"}


@pytest.mark.usefixtures("no_downloads")
@pytest.mark.parametrize(
    ("verb", "name"),
    [
        ("predict", "scores.csv"), ("predict, as JSON lines", "scores.jsonl"), ("evaluate", "report.html"),
        ("predict, as Parquet", "predictions.json"), ("shard", "000000.tar"), ("shard", "manifest.json"),
        ("train", "training.png"), ("train", "report.html"), ("train", "config.yaml"), ("train", "results.json"),
        ("predict", "unfinished/scores.csv"), ("evaluate", "metrics.json"), ("evaluate", "unfinished/mine/0.png"),
    ],
)  # fmt: skip
def test_a_file_of_somebody_else_stays_and_is_named(verb: str, name: str, arguments, command, tmp_path: Path) -> None:
    mine = tmp_path / "out" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    code, said = command(*arguments[verb], "--out", tmp_path / "out")
    assert code == 1
    assert str(tmp_path / "out" / name.partition("/")[0]) in said.splitlines()[-1] or "out: holds" in said
    assert "choose another folder" in said.splitlines()[-1]
    assert mine.read_text() == "mine"
    assert names_in(tmp_path / "out") == {name.partition("/")[0]}


def test_heat_maps_get_other_names_than_a_user_s_own_pictures(
    brick_checkpoint: Path, brick_tiles: Path, predict: Command, tmp_path: Path
) -> None:
    for name in ("cell.png", "cell_heatmap.png"):
        shutil.copy(brick_tiles / "0.png", tmp_path / name)
    own = (tmp_path / "cell_heatmap.png").read_bytes()
    for _ in range(2):
        images = (tmp_path / "cell.png", tmp_path / "cell_heatmap.png")
        assert predict(brick_checkpoint, *images, "--out", tmp_path)[0] == 0
        rows = {Path(row["image"]).name: row["heat_map"] for row in table_rows(tmp_path)}
        assert rows == {"cell.png": "cell_2_heatmap.png", "cell_heatmap.png": "cell_heatmap_heatmap.png"}
        assert (tmp_path / "cell_heatmap.png").read_bytes() == own
        assert names_in(tmp_path) == {"cell.png", "cell_heatmap.png", "scores.csv", *rows.values()}
        for name in rows.values():
            Image.open(tmp_path / name).load()


def test_new_predictions_take_the_place_of_all_earlier_ones(
    brick_checkpoint: Path, brick_tiles: Path, predict: Command, tmp_path: Path
) -> None:
    assert predict(brick_checkpoint, brick_tiles, "--out", tmp_path)[0] == 0
    (tmp_path / "note.txt").write_text("mine")
    assert predict(brick_checkpoint, brick_tiles / "3.png", "--out", tmp_path, "--format", "jsonl")[0] == 0
    assert names_in(tmp_path) == {"3_heatmap.png", "scores.jsonl", "note.txt"}
    assert predict(brick_checkpoint, brick_tiles / "4.png", "--out", tmp_path, "--no-heat-maps")[0] == 0
    assert names_in(tmp_path) == {"scores.csv", "note.txt"}


def test_a_table_without_pictures_leaves_one_of_another_format(
    brick_checkpoint: Path, brick_tiles: Path, predict: Command, tmp_path: Path
) -> None:
    for form in ("csv", "jsonl", "csv"):
        options = ("--format", form, "--no-heat-maps")
        assert predict(brick_checkpoint, brick_tiles / "3.png", "--out", tmp_path, *options)[0] == 0
    assert names_in(tmp_path) == {"scores.csv", "scores.jsonl"}
    assert owned_files(tmp_path, "predict") == {"scores.csv", "scores.jsonl"}


KILLED = """\
import os, signal
from fastmsflow.__main__ import main
from fastmsflow.evaluation import report

def killed(*args):
    os.kill(os.getpid(), signal.SIGKILL)

report.write_report = killed
main()
"""


@pytest.mark.slow
def test_an_evaluation_that_is_killed_leaves_earlier_results_and_the_next_one_removes_its_own(
    brick_checkpoint: Path, mvtec: Path, command, python: Path, tmp_path: Path
) -> None:
    words = ("evaluate", brick_checkpoint, mvtec, "--class", "tile", "--out", tmp_path)
    assert command(*words)[0] == 0
    before = files_in(tmp_path)
    killed = subprocess.run([python, "-c", KILLED, *map(str, words)], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert files_in(tmp_path) == before
    assert (tmp_path / "unfinished/scores.csv").is_file()
    assert command(*words)[0] == 0
    assert names_in(tmp_path) == set(before)


def test_a_model_that_was_replaced_while_it_is_calibrated_is_not_lost(
    brick_checkpoint: Path, brick_tiles: Path, command, monkeypatch, tmp_path: Path
) -> None:
    from fastmsflow.evaluation import calibrate_model

    path, newer = tmp_path / "model.safetensors", tmp_path / "newer.safetensors"
    shutil.copy(brick_checkpoint, path)
    shutil.copy(brick_checkpoint, newer)
    for folder in ("a", "b", "c", "d"):
        shutil.copytree(brick_tiles, tmp_path / "good" / folder)
    calibrate = calibrate_model.calibrate_on_files

    def replaced_meanwhile(*args: object, **options: object) -> object:
        result = calibrate(*args, **options)
        newer.replace(path)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(calibrate_model, "calibrate_on_files", replaced_meanwhile)
        content = newer.read_bytes()
        code, said = command("calibrate", path, tmp_path / "good", "--false-alarms", 0.5)
    assert code == 1
    assert said.splitlines()[-1] == f"fastmsflow: {path}: another process has replaced it meanwhile; calibrate it again"
    assert path.read_bytes() == content
    assert command("calibrate", path, tmp_path / "good", "--false-alarms", 0.5)[0] == 0
    assert read_config(path)["calibration"]["false_alarms"] == 0.5
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != "good"] == ["model.safetensors"]
