"""`train` as several processes, by torchrun and by --devices, and what SIGTERM does to them: the real commands."""

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from fastmsflow.data import list_images, write_shards
from fastmsflow.training.callbacks.preemption import STATE_SAVED
from tests.helpers.disks import small_disk
from tests.helpers.few_tiles import few_tiles
from tests.helpers.folder_listing import names_in
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow

PREEMPTED = 75
TINY = (
    "--extractor", "test_resnet.r160_in1k", "--image-size", "32", "--batch-size", "4", "--sub-epochs", "2",
    "--lr", "1e-3", "--quiet",
)  # fmt: skip
META_EPOCHS = 3
Train = tuple[object, ...]
Start = Callable[..., subprocess.Popen[str]]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastmsflow")


@pytest.fixture(scope="module")
def tiles(tmp_path_factory) -> Path:
    return few_tiles(tmp_path_factory.mktemp("tiles"))


@pytest.fixture(scope="module")
def train(tiles: Path, weights: Path) -> Train:
    """The command, but for where to."""
    given = ("train", tiles, "--class", "brick", *TINY, "--extractor-weights", weights)
    return (*given, "--meta-epochs", META_EPOCHS, "--logger", "csv", "--out")


def started_by(python: Path | str, *command: object, **more: str) -> subprocess.Popen[str]:
    """``more``: environment."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
    environment.pop("TRITON_INTERPRET", None)
    words = [str(python), *map(str, command)]
    return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def started(python: Path) -> Start:
    return partial(started_by, python)


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code, and what it and its processes said on standard error, when all of them have ended."""
    _, said = process.communicate(timeout=120)
    return process.returncode, said


def results_of(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def steps_of(out: Path) -> list[tuple[str, str]]:
    """(step, nll) as the csv logger has them, of one command after the other."""
    files = sorted(out.glob("logs/csv/version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1]))
    rows = [row for file in files for row in csv.DictReader(file.read_text().splitlines())]
    return [(row["step"], row["nll"]) for row in rows if row["gradient_norm"]]


@pytest.fixture(scope="module")
def undisturbed(train: Train, started: Start, tmp_path_factory) -> tuple[Path, Path]:
    """Returns the results of one process, and of two."""
    out = tmp_path_factory.mktemp("undisturbed")
    both = [
        started("-m", "fastmsflow", *train, out / "one"),
        started(*TORCHRUN, *train, out / "two"),
    ]
    for process in both:
        code, said = ended(process)
        assert code == 0, said
    return out / "one", out / "two"


def test_torchrun_and_one_process_come_to_the_same(undisturbed: tuple[Path, Path]) -> None:
    one, two = map(results_of, undisturbed)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["nll"] == pytest.approx(one["nll"], rel=1e-4)
    assert two["rounds"][-1]["held_out_nll"] == pytest.approx(one["rounds"][-1]["held_out_nll"], rel=1e-4)
    assert two["rounds"][-1]["pixel_auroc"] == pytest.approx(one["rounds"][-1]["pixel_auroc"], abs=1e-2)
    # What is shown of a run comes from the maps of both.
    ours, theirs = map(names_in, undisturbed)
    assert ours == theirs


def test_two_machines_come_to_what_two_processes_do(
    train: Train, started: Start, undisturbed: tuple[Path, Path], tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    command = ("-m", "fastmsflow", *train, tmp_path / "run", "--devices", 1, "--nodes", 2)
    both = [started(*command, **where) for _ in range(2)]
    said = [ended(process) for process in both]
    # The launcher that ends last may miss the other's store. It silences PyTorch's warning of it by a variable, which a
    # forked Python reads too late.
    assert [(code, text.partition("[W")[0]) for code, text in said] == [(0, ""), (0, "")]
    results, expected = results_of(tmp_path / "run"), results_of(undisturbed[1])
    assert (results["processes"], results["nll"]) == (2, expected["nll"])


def test_stopped_by_sigterm_and_with_a_killed_launcher_two_processes_repeat_no_step(
    train: Train, started: Start, undisturbed: tuple[Path, Path], tmp_path: Path
) -> None:
    out, temporary = tmp_path / "run", tmp_path / "temporary"
    temporary.mkdir()
    command = ("-m", "fastmsflow", *train, out, "--devices", 2)
    line = f"fastmsflow: stopped by SIGTERM; {STATE_SAVED}\n"
    process = started(*command, TMPDIR=str(temporary))
    wait_for(lambda: (out / "last.safetensors").exists())
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    # As from a scheduler, also when the processes have ended.
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (PREEMPTED, line)
    assert (out / "state.ckpt").exists()
    assert not list(temporary.glob("torchelastic_*"))

    before = (out / "state.ckpt").stat().st_mtime_ns
    # Its processes ask Linux to tell them of their parent's end.
    process = started_by(sys.executable, *command, "--resume")
    wait_for(lambda: (out / "state.ckpt").stat().st_mtime_ns != before)
    process.kill()
    assert ended(process) == (-signal.SIGKILL, line)
    code, said = ended(started(*command, "--resume"))
    assert code == 0, said
    assert results_of(out)["nll"] == results_of(undisturbed[1])["nll"]
    # A run that had begun anew would have had the same.
    assert steps_of(out) == steps_of(undisturbed[1])


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_process_that_is_killed_is_told_of(train: Train, started: Start, tmp_path: Path) -> None:
    process = started("-m", "fastmsflow", *train, tmp_path / "run", "--devices", 2)
    wait_for(lambda: len(of_rank(1, tmp_path)) == 1)
    os.kill(of_rank(1, tmp_path)[0], signal.SIGKILL)
    assert ended(process) == (
        128 + signal.SIGKILL,
        "fastmsflow: process 1 was killed by SIGKILL, most often because memory ran out; try fewer workers or a smaller"
        " batch\n",
    )


def of_rank(rank: int, out: Path) -> list[int]:
    """The processes of this rank that write somewhere in ``out``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            told = (process / "cmdline").read_bytes(), (process / "environ").read_bytes().split(b"\0")
            if str(out).encode() in told[0] and f"RANK={rank}".encode() in told[1]:
                found.append(int(process.name))
    return found


def test_a_full_disk_is_told_of_once(train: Train, started: Start, tmp_path: Path) -> None:
    """The first process alone writes; the other one's connection breaks in the middle of the training."""
    with small_disk(tmp_path / "disk", "64k") as disk:
        process = started("-m", "fastmsflow", *train, disk / "run", "--devices", 2)
        code, said = ended(process)
    assert (code, len(said.splitlines())) == (1, 1), said
    assert "last.safetensors: " in said and "space" in said


def test_a_folder_that_cannot_be_used_is_told_of_once(tiles: Path, started: Start, tmp_path: Path) -> None:
    process = started("-m", "fastmsflow", "train", tmp_path / "none", *TINY, "--out", tmp_path / "out", "--devices", 2)
    code, said = ended(process)
    assert code == 1
    assert (
        said
        == f"fastmsflow: {tmp_path / 'none'}: no such folder, and not a sample set (elpv, textures, small_defects)\n"
    )


def test_train_reads_shards(tiles: Path, weights: Path, tmp_path: Path, command) -> None:
    shards = tmp_path / "shards"
    write_shards(list_images(tiles / "brick/train/good"), shards, images_per_shard=3)
    broken = tmp_path / "broken"
    shutil.copytree(shards, broken)
    names = sorted(path.name for path in broken.glob("*.tar"))
    for name in names[1:2]:
        (broken / name).write_bytes((broken / name).read_bytes()[:2000])
    train = ("train", *TINY[:-1], "--extractor-weights", weights, "--meta-epochs", 1, "--hold-out", 0.25)
    code, text = command(*train[:1], shards, *train[1:], "--out", tmp_path / "run")
    assert code == 0, text
    assert f"{shards}: 24 training images" in text
    counts = results_of(tmp_path / "run")["images"]
    assert (counts["train"], counts["held_out"], counts["test"]) == (18, 6, 0)
    code, text = command(*train[:1], broken, *train[1:], "--out", tmp_path / "bad")
    assert code == 1 and names[1] in text
    faults = tmp_path / "faults.jsonl"
    code, text = command(*train[:1], broken, *train[1:], "--out", tmp_path / "skipped", "--error-log", faults)
    assert code == 0, text
    assert names[1] in faults.read_text()
    assert f"3 images left out by faults in 1 images or shards: see {faults}" in text
    code, text = command(*train[:1], shards, *train[1:], "--out", tmp_path / "x", "--feature-cache", tmp_path / "c")
    assert code == 1 and "images of shards are read in every pass, their features are not kept" in text
