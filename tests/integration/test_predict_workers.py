"""``fastmsflow predict`` into a table: images are read ahead by processes, and nothing else is different for it."""

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastmsflow.data import ahead_loader
from fastmsflow.data.image_batches import BatchReader, ImageBatch, read_batches
from tests.helpers.folder_listing import names_in
from tests.helpers.paths import ROOT
from tests.helpers.predictions import Command, contents

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_workers_change_neither_results_nor_faults_nor_order(
    form: str, checkpoint: Path, noise_images: Path, predict_parquet: Command, tmp_path: Path
) -> None:
    whole = (noise_images / "00.png").read_bytes()
    for name, content in (
        (b"new\nline.png", whole),
        (b"caf\xe9.png", whole),
        (b"empty \xff.png", b""),
        (b"no.png", b"?"),
    ):
        (tmp_path / os.fsdecode(name)).write_bytes(content)
    found = []
    for workers in (0, 2):
        out = tmp_path / f"out{workers}"
        options = ("--batch-size", 4, "--workers", workers, "--out", out)
        code, printed, err = predict_parquet(
            checkpoint, noise_images, *sorted(tmp_path.glob("*.png")), *options, form=form
        )
        assert (code, err.count("skipped ")) == (1, 2)
        found.append((contents(out), printed.replace(str(out), ""), err))
    assert found[0] == found[1]
    assert len(found[0][0]) == 1 + 20


@pytest.mark.parametrize(
    ("images", "size", "asked", "started"), [(8, 8, 2, 0), (9, 8, 2, 1), (40, 8, 2, 2), (40, 8, 0, 0)]
)
def test_no_more_workers_start_than_there_is_to_read_ahead(
    images: int, size: int, asked: int, started: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []
    monkeypatch.setattr(
        ahead_loader, "DataLoader", lambda *args, num_workers, **options: begun.append(num_workers) or iter(())
    )
    count = -(-images // size)
    list(read_batches((ImageBatch(0, []) for _ in range(count)), count, BatchReader((32, 32)), asked))
    assert begun == [started]


def children(process: int) -> list[int]:
    threads = Path(f"/proc/{process}/task").iterdir()
    return [int(child) for thread in threads for child in (thread / "children").read_text().split()]


def kill_a_worker(process: subprocess.Popen[str]) -> None:
    os.kill(children(process.pid)[0], signal.SIGKILL)


def press_ctrl_c(process: subprocess.Popen[str]) -> None:
    """A terminal sends it to all processes."""
    os.killpg(process.pid, signal.SIGINT)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("end", "code", "line"),
    [
        (kill_a_worker, 1, "fastmsflow: a process that reads images was killed, most often because memory ran out"),
        (press_ctrl_c, 130, "interrupted after"),
    ],
    ids=["a worker killed", "Ctrl-C"],
)
def test_what_was_written_is_kept_and_one_line_says_what_happened(
    end: Callable[[subprocess.Popen[str]], None],
    code: int,
    line: str,
    checkpoint: Path,
    noise_images: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "in").mkdir()
    for i in range(2000):
        os.link(noise_images / "00.png", tmp_path / f"in/{i:04}.png")
    args = [
        sys.executable,
        "-m",
        "fastmsflow",
        "predict",
        str(checkpoint),
        str(tmp_path / "in"),
        "--out",
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen(
        [*args, "--batch-size", "1", "--workers", "2"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    table = tmp_path / "out/unfinished/scores.csv"
    while not (table.exists() and table.read_bytes().count(b"\n") > 3):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    workers = children(process.pid)
    assert len(workers) == 2
    end(process)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err.startswith(line), len(err.strip().splitlines())) == (code, True, 1), err
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert 3 <= len(rows) < 2000
    assert all(row["largest_region"] and (table.parent / row["heat_map"]).is_file() for row in rows)
    assert names_in(tmp_path / "out") == {"unfinished"}
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
