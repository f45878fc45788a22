"""Predicting into Parquet goes on where it stopped, and takes the memory of a few images."""

import json
import os
import re
import shutil
import subprocess
import sys
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.fs import LocalFileSystem

from fastmsflow import InputError, MSFlow
from fastmsflow.data import write_shards
from fastmsflow.files import claimed_folder
from fastmsflow.inference.prediction_folder import PredictionFolder
from tests.helpers.paths import ROOT
from tests.helpers.predictions import IMAGES, PER_PART, Command, contents, rows, table, times

SMALL = ("--images-per-part", PER_PART, "--batch-size", PER_PART)

# Going on


KILLED = """\
import os, signal
from pathlib import Path
from fastmsflow.__main__ import main

replace = Path.replace

def killed(aside, target):
    if "000002" in str(target):
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(aside, target)

Path.replace = killed
main()
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_behind_its_finished_parts_and_ends_in_the_same_bytes(
    checkpoint: Path, noise_shards: Path, predict_parquet: Command, python: Path, tmp_path: Path
) -> None:
    out, options = tmp_path / "out", (checkpoint, noise_shards, "--workers", 0, *SMALL)
    args = [python, "-c", KILLED, "predict", *map(str, options), "--out", str(out), "--format", "parquet"]
    killed = subprocess.run(args, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert killed.returncode == -9, killed.stderr
    before = times(out)
    assert sorted(before) == ["part-000000.parquet", "part-000001.parquet"]
    assert list(out.glob("parts/.*aside*")), "nothing half-written to be cleaned up"

    assert predict_parquet(*options, "--out", out)[0] == 0
    assert before.items() <= times(out).items()
    predict_parquet(*options, "--out", tmp_path / "at once")
    assert contents(out) == contents(tmp_path / "at once")

    before = times(out)
    code, printed, _ = predict_parquet(*options, "--out", out)
    assert (code, "all were there already" in printed, times(out)) == (0, True, before)


def test_an_interruption_keeps_finished_parts_and_says_how_to_go_on(
    checkpoint: Path, noise_shards: Path, predict_parquet: Command, tmp_path: Path, monkeypatch
) -> None:
    write = PredictionFolder.write

    def interrupted(folder: PredictionFolder, rows: Any) -> None:
        if len(times(tmp_path)) == 2:
            raise KeyboardInterrupt
        write(folder, rows)

    monkeypatch.setattr(PredictionFolder, "write", interrupted)
    code, _, err = predict_parquet(checkpoint, noise_shards, "--out", tmp_path, "--workers", 0, *SMALL)
    assert (code, err.strip()) == (130, f"interrupted: 8 images have rows in {tmp_path}; the same command goes on")
    assert set(contents(tmp_path)) == {"part-000000.parquet", "part-000001.parquet", "predictions.json"}


@pytest.mark.parametrize("end", [-100, 4, 0], ids=["near its end", "behind its first bytes", "empty"])
def test_the_images_of_a_part_that_is_cut_off_are_scored_again(
    end: int, checkpoint: Path, noise_shards: Path, predict_parquet: Command, tmp_path: Path
) -> None:
    predict_parquet(checkpoint, noise_shards, "--out", tmp_path, "--workers", 0, *SMALL)
    before, part = rows(tmp_path), tmp_path / "parts/part-000001.parquet"
    part.write_bytes(part.read_bytes()[:end])
    code, printed, _ = predict_parquet(checkpoint, noise_shards, "--out", tmp_path, "--workers", 0, *SMALL, "--json")
    assert (code, json.loads(printed)["scored_now"]) == (0, PER_PART)
    assert sorted(rows(tmp_path), key=itemgetter("path")) == before


def test_new_images_are_scored_and_old_ones_are_not(
    checkpoint: Path, noise_images: Path, predict_parquet: Command, tmp_path: Path
) -> None:
    named = sorted(noise_images.iterdir())
    for some, expected in ((named[5:9], 4), (named[:7], 5), (named, IMAGES - 9), (named[::-1], 0)):
        code, printed, _ = predict_parquet(checkpoint, *some, "--out", tmp_path, "--workers", 0, "--json")
        assert (code, json.loads(printed)["scored_now"]) == (0, expected)
    assert sorted(row["path"] for row in rows(tmp_path)) == list(map(str, named))


def test_an_image_is_the_same_by_whatever_path_it_is_named(
    checkpoint: Path, noise_images: Path, predict_parquet: Command, tmp_path: Path, monkeypatch
) -> None:
    predict_parquet(checkpoint, noise_images, "--out", tmp_path / "out", "--workers", 0)
    monkeypatch.chdir(noise_images)
    for name in (".", f"../{noise_images.name}"):
        code, printed, _ = predict_parquet(checkpoint, name, "--out", tmp_path / "out", "--workers", 0, "--json")
        assert (code, json.loads(printed)["scored_now"]) == (0, 0)


@pytest.mark.parametrize("other", ["model", "threshold"])
def test_results_of_another_setting_are_not_mixed_with_these(
    other: str,
    calibrated_model: MSFlow,
    checkpoint: Path,
    noise_images: Path,
    predict_parquet: Command,
    tmp_path: Path,
) -> None:
    out, threshold = tmp_path / "out", 0.5
    predict_parquet(checkpoint, noise_images, "--out", out, "--workers", 0, "--threshold", threshold)
    before = contents(out)
    if other == "model":
        bias = next(calibrated_model.flow.parameters()).data
        bias += 1
        checkpoint = tmp_path / "m.safetensors"
        calibrated_model.save(checkpoint)
        bias -= 1
    else:
        threshold = 0.25
    code, _, err = predict_parquet(checkpoint, noise_images, "--out", out, "--workers", 0, "--threshold", threshold)
    assert code == 1
    change = {"model": r"model was [0-9a-f]{16}, is [0-9a-f]{16}", "threshold": "threshold was 0.5, is 0.25"}[other]
    line = rf"fastmsflow: {out}: holds results of another run \({change}\); set that back, or choose another folder"
    assert re.fullmatch(line, err), err
    assert contents(out) == before


def test_a_model_is_known_by_what_it_holds_not_by_its_name(
    checkpoint: Path, noise_shards: Path, predict_parquet: Command, tmp_path: Path
) -> None:
    predict_parquet(checkpoint, noise_shards, "--out", tmp_path / "out", "--workers", 0)
    shutil.copy(checkpoint, tmp_path / "moved.safetensors")
    before = times(tmp_path / "out")
    assert (
        predict_parquet(tmp_path / "moved.safetensors", noise_shards, "--out", tmp_path / "out", "--workers", 0)[0] == 0
    )
    assert times(tmp_path / "out") == before


def test_a_folder_of_something_else_is_left_as_it_is(
    checkpoint: Path, noise_images: Path, noise_shards_copy: Path, predict_parquet: Command, tmp_path: Path
) -> None:
    before = contents(noise_shards_copy)
    code, _, err = predict_parquet(checkpoint, noise_shards_copy, "--out", noise_shards_copy, "--workers", 0)
    assert (code, "holds a set of shards; choose another folder" in err) == (1, True)
    assert contents(noise_shards_copy) == before
    out = tmp_path / "out"
    predict_parquet(checkpoint, noise_shards_copy, "--out", out, "--workers", 0)
    whole = contents(out)
    for content, fault in (
        (None, "holds parts, and no predictions.json that says of what"),
        ("[", "holds a predictions.json of something else"),
        ('{"format": "fastmsflow predictions 1"}', "holds results of an earlier version, in other columns"),
    ):
        (out / "predictions.json").unlink(missing_ok=True)
        if content is not None:
            (out / "predictions.json").write_text(content)
        code, _, err = predict_parquet(checkpoint, noise_shards_copy, "--out", out, "--workers", 0)
        assert (code, f"{fault}; choose another folder" in err) == (1, True), err
        assert contents(out).items() - whole.items() <= {("predictions.json", (content or "").encode())}


def test_pipes_are_not_waited_for(
    checkpoint: Path, noise_shards: Path, predict_parquet: Command, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / "parts").mkdir(parents=True)
    os.mkfifo(out / "predictions.json")
    code, _, err = predict_parquet(checkpoint, noise_shards, "--out", out, "--workers", 0)
    assert (code, "holds a predictions.json of something else; choose another folder" in err) == (1, True)
    (out / "predictions.json").unlink()
    os.mkfifo(out / "parts/a.parquet")
    code, _, err = predict_parquet(checkpoint, noise_shards, "--out", out, "--workers", 0)
    assert code == 0, err


def test_two_commands_do_not_share_a_folder(
    checkpoint: Path, noise_shards: Path, predict_parquet: Command, tmp_path: Path
) -> None:
    with claimed_folder(tmp_path / "out"):
        code, _, err = predict_parquet(checkpoint, noise_shards, "--out", tmp_path / "out", "--workers", 0)
    assert (code, "another process is writing there" in err) == (1, True)


# Memory


PEAKS = """\
from pathlib import Path
from fastmsflow.__main__ import main
from fastmsflow.inference.prediction_folder import PredictionFolder

write = PredictionFolder.write

def recorded(folder, rows):
    write(folder, rows)
    # Not ru_maxrss: a process begins with its parent's, here pytest's.
    print("peak", Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

PredictionFolder.write = recorded
main()
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(checkpoint: Path, noise_images: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(2_000):
        os.link(noise_images / "00.png", tmp_path / f"in/{i:04}.png")
    write_shards(sorted((tmp_path / "in").iterdir()), tmp_path / "set", 100)
    options = (
        checkpoint,
        tmp_path / "set",
        "--out",
        tmp_path / "out",
        "--workers",
        0,
        "--batch-size",
        50,
        "--images-per-part",
        100,
        "--quiet",
    )
    args = [sys.executable, "-c", PEAKS, "predict", *map(str, options), "--format", "parquet"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    printed = subprocess.run(args, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout.split()
    peaks = [int(value) for value in printed[1::2]]
    assert len(peaks) == 20
    assert peaks[-1] < 1.05 * peaks[1], f"peak RSS {peaks[1]} KiB after 200 images, {peaks[-1]} KiB after 2,000"


# What is not of this command


def test_what_a_link_leads_to_is_neither_read_nor_removed(
    checkpoint: Path, noise_images: Path, predict_parquet: Command, tmp_path: Path
) -> None:
    out, outside = tmp_path / "out", tmp_path / "outside"
    predict_parquet(checkpoint, noise_images, "--out", out, "--workers", 0)
    outside.mkdir()
    (outside / "part-000009.parquet").write_bytes(b"not Parquet")
    (out / "parts/link").symlink_to(outside)
    (out / "parts/part-000008.parquet").symlink_to(outside / "part-000009.parquet")
    code, printed, _ = predict_parquet(checkpoint, noise_images, "--out", out, "--workers", 0, "--json")
    assert (code, json.loads(printed)["images"]) == (0, IMAGES)
    assert (outside / "part-000009.parquet").read_bytes() == b"not Parquet"


def test_a_foreign_file_is_named_and_stays(
    checkpoint: Path, noise_images: Path, predict_parquet: Command, tmp_path: Path
) -> None:
    predict_parquet(checkpoint, noise_images, "--out", tmp_path, "--workers", 0)
    for content, fault in (
        (b"no Parquet", "it is not whole, and this command has not written it; move it elsewhere"),
        (None, "no results that can"),
    ):
        foreign = tmp_path / "parts/foreign.parquet"
        if content is None:
            pq.write_table(pa.table({"number": [1]}), foreign)
        else:
            foreign.write_bytes(content)
        code, _, err = predict_parquet(checkpoint, noise_images, "--out", tmp_path, "--workers", 0)
        assert (code, err.startswith(f"fastmsflow: {foreign}: {fault}"), len(err.splitlines())) == (1, True, 1), err
        assert foreign.exists()


def test_a_part_that_cannot_be_opened_is_not_taken_for_one_that_is_cut_off(
    checkpoint: Path, noise_images: Path, predict_parquet: Command, tmp_path: Path, monkeypatch
) -> None:
    predict_parquet(checkpoint, noise_images, "--out", tmp_path, "--workers", 0)
    before = contents(tmp_path)

    class Refuses:
        def open_input_file(self, name: str) -> Any:
            if name.endswith(".json"):
                return open(name, "rb")  # noqa: PTH123 - as a file system does
            raise OSError(110, "Connection timed out")

        def get_file_info(self, name: str) -> Any:
            return LocalFileSystem().get_file_info(name)

    monkeypatch.setattr("fastmsflow.inference.prediction_folder.fs.LocalFileSystem", Refuses)
    code, _, err = predict_parquet(checkpoint, noise_images, "--out", tmp_path, "--workers", 0)
    assert (code, err.endswith("cannot be read ([Errno 110] Connection timed out)")) == (1, True), err
    assert contents(tmp_path) == before


def test_other_engines_kinds_of_text_are_read(
    checkpoint: Path, noise_images: Path, predict_parquet: Command, tmp_path: Path
) -> None:
    predict_parquet(checkpoint, noise_images, "--out", tmp_path, "--workers", 0)
    part = tmp_path / "parts/part-000000.parquet"
    rows = table(part)
    pq.write_table(rows.set_column(0, "path", rows["path"].cast(pa.large_string()).dictionary_encode()), part)
    code, printed, _ = predict_parquet(checkpoint, noise_images, "--out", tmp_path, "--workers", 0, "--json")
    assert (code, json.loads(printed)["images"], json.loads(printed)["scored_now"]) == (0, IMAGES, 0)


def test_rows_that_another_set_of_shards_has_lost_stay(
    checkpoint: Path, noise_images: Path, noise_shards_copy: Path, predict_parquet: Command, tmp_path: Path
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    (noise_shards_copy / "000002.tar").write_bytes((noise_shards_copy / "000002.tar").read_bytes()[:9000])
    write_shards(sorted(noise_images.iterdir())[:5], other, 5)
    predict_parquet(checkpoint, noise_shards_copy, "--out", out, "--workers", 0)
    before = len(rows(out))
    assert predict_parquet(checkpoint, other, "--out", out, "--workers", 0)[0] == 1
    assert len(rows(out)) == before + 5


def test_images_of_shards_are_not_repeated_whatever_bytes_their_names_have(
    checkpoint: Path, noise_images: Path, predict_parquet: Command, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for i, name in enumerate((b"a.png", b"b \xff.png", b"c\n.png", b"d.png")):
        shutil.copy(noise_images / f"{i:02}.png", tmp_path / "in" / os.fsdecode(name))
    write_shards(sorted((tmp_path / "in").iterdir()), tmp_path / "set", 4)
    out, given = tmp_path / "out", ("--workers", 0, "--images-per-part", 1, "--batch-size", 2)
    predict_parquet(checkpoint, tmp_path / "set", "--out", out, *given)
    (out / "parts/part-000003.parquet").unlink()
    code, printed, _ = predict_parquet(checkpoint, tmp_path / "set", "--out", out, *given, "--json")
    summary = json.loads(printed)
    assert (code, summary["images"], summary["scored_now"]) == (0, 4, 1)


@pytest.mark.parametrize("fails", [False, True], ids=["", "though this run fails"])
def test_what_a_killed_cluster_writes_late_is_removed(
    fails: bool, checkpoint: Path, noise_images: Path, predict_parquet: Command, tmp_path: Path, monkeypatch
) -> None:
    """Its run is named in predictions.json, beside names that would be of every file; the file comes while this run
    scores the same images."""
    first, *others = sorted(noise_images.iterdir())
    predict_parquet(checkpoint, first, "--out", tmp_path, "--workers", 0)
    head = json.loads((tmp_path / "predictions.json").read_text())
    dead = "0" * 32
    (tmp_path / "predictions.json").write_text(json.dumps({**head, "runs": [dead, "", 1]}))
    write = PredictionFolder.write

    def late(folder: PredictionFolder, rows: Any) -> None:
        write(folder, rows)
        pq.write_table(rows, tmp_path / f"parts/{dead}_late.parquet")
        if fails:
            raise InputError("the disk is full")

    monkeypatch.setattr(PredictionFolder, "write", late)
    code, printed, err = predict_parquet(checkpoint, *others, "--out", tmp_path, "--workers", 0, "--json")
    if fails:
        assert (code, err) == (1, "fastmsflow: the disk is full")
    else:
        assert (code, json.loads(printed)["images"]) == (0, IMAGES)
    assert not list((tmp_path / "parts").glob(f"{dead}*"))
