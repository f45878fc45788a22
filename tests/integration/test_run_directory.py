"""A run's folder is never written over, and a run goes on after a stop, a full disk or a kill."""

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from fastmsflow import MSFlow
from fastmsflow.files import LOCK_FILE
from fastmsflow.training.run_directory import SETTINGS_FILE, STATE_FILE
from tests.helpers.disks import remount, small_disk
from tests.helpers.folder_listing import names_in
from tests.helpers.small_runs import SMALL, interrupted, train_args

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_downloads")]


def test_a_run_is_never_written_over_and_says_how_to_go_on(
    two_classes: Path, command, monkeypatch, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    interrupted(two_classes, out, command, monkeypatch)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    code, text = command(*train_args(two_classes, out))
    assert code == 1
    assert f"{out}: holds an interrupted run; go on with it by --resume, or choose another folder" in text
    code, text = command(*train_args(two_classes, out, "--resume", "--lr", 5e-4, "--clip-norm", 3))
    assert code == 1
    assert "needs the settings that it began with: recipe.lr was 0.001, is 0.0005; recipe.clip_norm was 2.0, is" in text
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert command(*train_args(two_classes, out, "--resume"))[0] == 0
    assert not (out / STATE_FILE).exists()
    for more in ((), ("--resume",)):
        code, text = command(*train_args(two_classes, out, *more))
        assert code == 1
        assert f"{out}: holds a finished run, of which `fastmsflow evaluate` reports; choose another folder" in text


def test_a_resumed_run_with_other_images_is_refused(two_classes: Path, command, monkeypatch, tmp_path: Path) -> None:
    copy = tmp_path / "tiles"
    shutil.copytree(two_classes, copy)
    interrupted(copy, tmp_path / "run", command, monkeypatch)
    shutil.copy(copy / "a/train/good/00.png", copy / "a/train/good/01.png")
    code, text = command(*train_args(copy, tmp_path / "run", "--resume"))
    assert code == 1
    assert "images.fingerprint was" in text


def test_a_damaged_state_is_named(two_classes: Path, command, monkeypatch, tmp_path: Path) -> None:
    out = tmp_path / "run"
    interrupted(two_classes, out, command, monkeypatch)
    (out / STATE_FILE).write_bytes(b"half")
    code, text = command(*train_args(two_classes, out, "--resume"))
    assert code == 1
    assert f"{out / STATE_FILE}: damaged" in text.strip().splitlines()[-1]
    assert "remove it to begin the run again" in text


def test_a_resumed_run_with_another_extractor_is_refused(
    two_classes: Path, command, monkeypatch, tmp_path: Path
) -> None:
    interrupted(two_classes, tmp_path / "run", command, monkeypatch)
    made = MSFlow.__init__

    def other(self, *args, **options) -> None:
        made(self, *args, **options)
        next(self.extractor.parameters()).data.add_(1)

    monkeypatch.setattr(MSFlow, "__init__", other)
    code, text = command(*train_args(two_classes, tmp_path / "run", "--resume"))
    assert code == 1
    assert "the extractor's weights are not those that the run began with" in text.strip().splitlines()[-1]


def test_a_run_killed_before_it_removed_its_state_is_finished(runs: Path, two_classes: Path, command, tmp_path) -> None:
    shutil.copytree(runs / "a", tmp_path / "run")
    (tmp_path / "run" / STATE_FILE).touch()
    (tmp_path / "run" / SETTINGS_FILE).touch()
    code, text = command(*train_args(two_classes, tmp_path / "run", "--resume"))
    assert code == 1
    assert "holds a finished run" in text
    assert not [name for name in (STATE_FILE, SETTINGS_FILE) if (tmp_path / "run" / name).exists()]


@pytest.mark.parametrize("name", ["last.safetensors", "best.safetensors", "best_on_test.safetensors"])
def test_a_model_in_the_folder_is_not_written_over(name: str, two_classes: Path, command, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"dear")
    code, _ = command(*train_args(two_classes, tmp_path))
    assert code == 1
    assert (tmp_path / name).read_bytes() == b"dear"


@pytest.mark.parametrize("name", ["state-settings.json", "training.png", "scores.csv"])
def test_a_file_of_somebody_else_stays_whatever_says_that_a_run_was_killed(
    name: str, two_classes: Path, command, tmp_path: Path
) -> None:
    (tmp_path / "state-settings.json").write_text("{}") if name != "state-settings.json" else os.mkfifo(tmp_path / name)
    if name != "state-settings.json":
        (tmp_path / name).write_bytes(b"dear")
    code, text = command(*train_args(two_classes, tmp_path))
    assert (code, f"{name}: would be written over; move it" in text) == (1, True), text
    assert {path.name for path in tmp_path.iterdir()} - {LOCK_FILE} == {"state-settings.json", name}


def test_two_runs_into_one_folder_are_refused(two_classes: Path, command, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    with FileLock(out / LOCK_FILE):
        code, text = command(*train_args(two_classes, out))
    assert code == 1
    assert f"{out}: another process is writing there; choose another folder, or wait for it" in text


def test_a_disk_that_fills_up_in_training_loses_nothing_and_the_run_goes_on(
    two_classes: Path, command, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    assert command(*train_args(two_classes, whole))[0] == 0
    model = (whole / "last.safetensors").stat().st_size
    # Room for the models of the first round and its state, not for a state beside it.
    with small_disk(tmp_path / "disk", str(int(7.5 * model))) as disk:
        out = disk / "run"
        code, text = command(*train_args(two_classes, out))
        assert code == 1
        last = text.strip().splitlines()[-1]
        assert last.startswith(f"fastmsflow: {out}/")
        assert "the disk is full; free some space or choose another folder" in last
        names = names_in(out)
        assert {"last.safetensors", STATE_FILE} <= names
        assert not any(name.startswith(".") for name in names)
        for path in out.glob("*.safetensors"):
            MSFlow.load(path)
        remount(disk, f"size={20 * model}")
        assert command(*train_args(two_classes, out, "--resume"))[0] == 0
        first, again = (json.loads((folder / "results.json").read_text()) for folder in (whole, out))
        assert again["nll"] == first["nll"]


def test_a_read_only_disk_is_found_out_before_the_training(two_classes: Path, command, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        remount(disk, "ro")
        code, text = command(*train_args(two_classes, disk / "run"))
    assert code == 1
    assert text.strip().splitlines()[-1].startswith(f"fastmsflow: {disk}")
    assert "a read-only disk; choose another folder" in text


def test_a_full_disk_leaves_an_earlier_report_whole(runs: Path, two_classes: Path, command, tmp_path: Path) -> None:
    arguments = ("evaluate", runs / "a/last.safetensors", two_classes, "--class", "a", "--out")
    with small_disk(tmp_path / "disk", "4m") as disk:
        assert command(*arguments, disk)[0] == 0
        before = {path.name: path.read_bytes() for path in disk.iterdir()}
        remount(disk, f"size={sum(map(len, before.values())) // 4096 * 4096 + 40960}")
        code, text = command(*arguments, disk)
        assert code == 1
        assert "the disk is full" in text.strip().splitlines()[-1]
        after = {path.name: path.read_bytes() for path in disk.iterdir()}
        assert after.keys() == before.keys()
        assert after["report.html"].endswith(b"</html>\n")


def test_names_with_spaces_quotes_newlines_and_bytes_that_are_no_text_go_all_the_way(
    two_classes: Path, command, tmp_path: Path
) -> None:
    names = [b"a $b$.png", b"'quoted\" <b>.png", b"two\nlines.png", b"caf\xe9.png"]
    for part in ("train/good", "test/good", "test/spot"):
        (tmp_path / "set" / part).mkdir(parents=True)
        for i, (name, image) in enumerate(zip(names * 6, sorted((two_classes / "a" / part).iterdir()), strict=False)):
            shutil.copy(image, os.fsencode(tmp_path / "set" / part) + b"/" + str(i).encode() + name)
    code, _ = command("train", tmp_path / "set", "--out", tmp_path / "run", *SMALL, "--meta-epochs", 1)
    assert code == 0
    assert b"caf\xe9.png" in (tmp_path / "run/scores.csv").read_bytes()
    with (tmp_path / "run/scores.csv").open(newline="", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert all(Path(row["image"]).is_file() for row in rows)
    code, _ = command("evaluate", tmp_path / "run", tmp_path / "set", "--out", tmp_path / "eval")
    assert code == 0


def test_models_that_no_run_left_are_never_written_over(runs: Path, two_classes: Path, command, tmp_path: Path) -> None:
    out = tmp_path / "models"
    out.mkdir()
    shutil.copy(runs / "a/last.safetensors", out)
    before = (out / "last.safetensors").read_bytes()
    for more, message in (((), "holds an interrupted run"), (("--resume",), "holds models, but no run to go on with")):
        code, text = command(*train_args(two_classes, out, *more))
        assert code == 1
        assert f"{out}: {message}" in text
    assert names_in(out) == {"last.safetensors"}
    assert (out / "last.safetensors").read_bytes() == before
