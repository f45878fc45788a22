"""Predicting in parts goes on where it stopped, by several processes, in the memory of a few images."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from parts_predicted import (
    IMAGES,
    PER_PART,
    ROOT,
    Command,
    command,
    contents,
    images,
    manifest,
    model,
    network,
    rows,
    shards,
    table,
    times,
    written,
)

from fastmsflow import MSFlow
from fastmsflow.data import write_shards
from fastmsflow.files import claimed_folder
from fastmsflow.report.parquet import Table
from fastmsflow.report.parts import Run

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


def test_a_killed_run_goes_on_behind_its_finished_parts_and_ends_in_the_same_bytes(
    model: Path, written: Path, command: Command, tmp_path: Path
) -> None:
    out, options = tmp_path / "out", (model, written, "--workers", 0)
    args = [sys.executable, "-c", KILLED, "predict", *map(str, options), "--out", str(out), "--format", "parquet"]
    killed = subprocess.run(args, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert killed.returncode == -9, killed.stderr
    before = times(out)
    assert sorted(before) == ["part-000000.parquet", "part-000001.parquet"]
    assert list(out.glob("parts/.*aside*")), "nothing half-written to be cleaned up"
    assert not (out / "manifest.json").exists()

    assert command(*options, "--out", out)[0] == 0
    assert before.items() <= times(out).items()
    command(*options, "--out", tmp_path / "at once")
    assert contents(out) == contents(tmp_path / "at once")

    before = times(out)
    code, printed, _ = command(*options, "--out", out)
    assert (code, "all were there already" in printed, times(out)) == (0, True, before)


def test_an_interruption_keeps_finished_parts_and_says_how_to_go_on(
    model: Path, written: Path, command: Command, tmp_path: Path, monkeypatch
) -> None:
    write = Table.write

    def interrupted(table: Table, path: Path, *args: Any) -> None:
        if "000002" in path.name:
            raise KeyboardInterrupt
        write(table, path, *args)

    monkeypatch.setattr(Table, "write", interrupted)
    code, _, err = command(model, written, "--out", tmp_path, "--workers", 0)
    assert code == 130
    assert err.strip() == (
        f"interrupted: 2 of 5 parts are finished in {tmp_path}; the same command goes on behind them"
    )
    assert set(contents(tmp_path)) == {"part-000000.parquet", "part-000001.parquet", "predictions.json"}


def test_a_part_that_is_not_whole_is_done_again(model: Path, written: Path, command: Command, tmp_path: Path) -> None:
    command(model, written, "--out", tmp_path, "--workers", 0)
    before, part = contents(tmp_path), tmp_path / "parts/part-000001.parquet"
    part.write_bytes(part.read_bytes()[:-100])
    assert command(model, written, "--out", tmp_path, "--workers", 0)[0] == 0
    assert contents(tmp_path) == before


@pytest.mark.parametrize("other", ["model", "threshold", "images", "images per part"])
def test_what_another_run_left_is_not_mixed_with_this_one(
    other: str, network: MSFlow, model: Path, images: Path, command: Command, tmp_path: Path
) -> None:
    out, named = tmp_path / "out", sorted(images.iterdir())
    command(model, *named, "--out", out, "--workers", 0, "--images-per-part", PER_PART, "--threshold", 0.5)
    before = contents(out)
    options = {"--images-per-part": PER_PART, "--threshold": 0.5}
    if other == "model":
        bias = next(network.flow.parameters()).data
        bias += 1
        model = tmp_path / "m.safetensors"
        network.save(model)
        bias -= 1
    elif other == "threshold":
        options["--threshold"] = 0.25
    elif other == "images":
        named = [*named[1:], named[0]]
    else:
        options["--images-per-part"] = 5
    given = [text for option in options.items() for text in option]
    code, _, err = command(model, *named, "--out", out, "--workers", 0, *given)
    assert code == 1
    change = {
        "model": r"model was [0-9a-f]{16}, is [0-9a-f]{16}",
        "threshold": "threshold was 0.5, is 0.25",
        "images": "source was files [0-9a-f]{16}, is files [0-9a-f]{16}",
        "images per part": "images per part was 4, is 5",
    }[other]
    line = rf"fastmsflow: {out}: holds results of another run \({change}\); set that back, or choose another folder"
    assert re.fullmatch(line, err), err
    assert contents(out) == before


def test_a_model_is_known_by_what_it_holds_not_by_its_name(
    model: Path, written: Path, command: Command, tmp_path: Path
) -> None:
    command(model, written, "--out", tmp_path / "out", "--workers", 0)
    shutil.copy(model, tmp_path / "moved.safetensors")
    before = times(tmp_path / "out")
    assert command(tmp_path / "moved.safetensors", written, "--out", tmp_path / "out", "--workers", 0)[0] == 0
    assert times(tmp_path / "out") == before


def test_a_folder_of_something_else_is_left_as_it_is(
    model: Path, images: Path, shards: Path, command: Command, tmp_path: Path
) -> None:
    before = contents(shards)
    code, _, err = command(model, shards, "--out", shards, "--workers", 0)
    assert (code, "holds a predictions.json or manifest.json of something else" in err) == (1, True)
    assert contents(shards) == before
    command(model, shards, "--out", tmp_path / "out", "--workers", 0)
    (tmp_path / "out/predictions.json").unlink()
    (tmp_path / "out/manifest.json").unlink()
    before = contents(tmp_path / "out")
    code, _, err = command(model, shards, "--out", tmp_path / "out", "--workers", 0)
    assert (code, "holds parts, and no predictions.json that says of what" in err) == (1, True)
    assert contents(tmp_path / "out") == before


# Several processes


def test_two_processes_share_out_the_parts_of_one_list(
    model: Path, images: Path, command: Command, tmp_path: Path
) -> None:
    """By the command line itself; of names on standard input, which one process alone can read."""
    (tmp_path / "bad.png").write_bytes(b"")
    names = [*sorted(images.iterdir()), tmp_path / "bad.png"]
    listed = b"".join(os.fsencode(name) + b"\0" for name in names)
    options = (model, "-", "--null", "--images-per-part", PER_PART, "--format", "parquet", "--json")
    args = [sys.executable, "-m", "fastmsflow", "predict", *map(str, options), "--devices", "2", "--workers", "1"]
    both = subprocess.run(
        [*args, "--out", str(tmp_path / "two")],
        input=listed,
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert both.returncode == 1, both.stderr
    assert (
        both.stderr.decode().strip()
        == f"skipped {tmp_path}/bad.png: empty (0 bytes), not an image; remove it or save it as PNG"
    )
    summary = json.loads(both.stdout)
    assert (summary["images"], summary["faults"], summary["scored_now"]) == (IMAGES + 1, 1, IMAGES + 1)

    command(
        model, "-", "--null", "--images-per-part", PER_PART, "--workers", 0, "--out", tmp_path / "one", stdin=listed
    )
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_only_parts_that_are_missing_are_scored(
    model: Path, written: Path, command: Command, tmp_path: Path, monkeypatch
) -> None:
    scored, score = [], Run.score

    def recorded(run: Run, scorer: Any, parts: list[int], *args: Any) -> None:
        scored.append(parts)
        score(run, scorer, parts, *args)

    monkeypatch.setattr(Run, "score", recorded)
    command(model, written, "--out", tmp_path, "--workers", 0)
    for part in (1, 2, 4):
        (tmp_path / f"parts/part-{part:06}.parquet").unlink()
    command(model, written, "--out", tmp_path, "--workers", 0)
    assert scored == [[0, 1, 2, 3, 4], [1, 2, 4]]


def test_two_commands_do_not_share_a_folder(model: Path, written: Path, command: Command, tmp_path: Path) -> None:
    with claimed_folder(tmp_path / "out"):
        code, _, err = command(model, written, "--out", tmp_path / "out", "--workers", 0)
    assert (code, "another process is writing there" in err) == (1, True)


# Memory


PEAKS = """\
from pathlib import Path
from fastmsflow.__main__ import main
from fastmsflow.report.parquet import Table

write = Table.write

def recorded(table, path, *args):
    write(table, path, *args)
    # Not ru_maxrss: a process begins with its parent's, here pytest's.
    print(path.name, Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

Table.write = recorded
main()
"""


def test_memory_does_not_grow_with_the_number_of_images(model: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(2_000):
        os.link(images / "00.png", tmp_path / f"in/{i:04}.png")
    write_shards(sorted((tmp_path / "in").iterdir()), tmp_path / "set", 100)
    options = (model, tmp_path / "set", "--out", tmp_path / "out", "--workers", 0, "--batch-size", 50, "--quiet")
    args = [sys.executable, "-c", PEAKS, "predict", *map(str, options), "--format", "parquet"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    printed = subprocess.run(args, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout.split()
    peaks = [int(value) for value in printed[1::2]]
    assert len(peaks) == 20
    assert peaks[-1] < 1.05 * peaks[1], f"peak RSS {peaks[1]} KiB after 200 images, {peaks[-1]} KiB after 2,000"
