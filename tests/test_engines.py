"""docs/engines.md on going on after a stop, as it stands there, on a Ray of this machine."""

import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastmsflow.inference import BatchScorer
from tests.helpers.paths import ROOT
from tests.helpers.predictions import table
from tests.helpers.same_rows import assert_same_row

pytest.importorskip("ray.data", reason="needs Ray: pip install 'fastmsflow[ray]'")
import pyarrow as pa
from pyarrow import parquet as pq

PAGE = (ROOT / "docs/engines.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


class KilledOnce(BatchScorer):
    """Ends its process in the middle of the first batch, as for want of memory."""

    def __call__(self, batch):
        results = super().__call__(batch)
        mark = Path(os.environ["KILLED"])
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return results


@pytest.fixture
def folder(noise_images: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/best.safetensors").write_bytes(checkpoint.read_bytes())
    (tmp_path / "new_images").symlink_to(noise_images)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KILLED", str(tmp_path / "killed"))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    yield tmp_path
    import ray

    ray.shutdown()


def test_going_on_writes_what_is_not_there_once_though_a_file_is_cut_off_and_a_worker_killed(folder: Path):
    names: dict = {}

    def run(text: str) -> None:
        (found,) = (block for block in BLOCKS if text in block)
        exec(found, names)

    run("results = scorer(")
    run("ray.init(")
    paths = [str(image) for image in names["images"]]
    results = Path(names["results"])
    results.mkdir()
    written = BatchScorer(names["model"])(pa.table({"path": paths[:6]}))
    pq.write_table(written.slice(0, 4), results / "whole.parquet")
    pq.write_table(written, results / "cut.parquet")
    os.truncate(results / "cut.parquet", 900)

    names |= {"BatchScorer": KilledOnce, "parquet": pq}
    run("done = set()")
    assert (folder / "killed").exists()
    assert not (results / "cut.parquet").exists()
    rows = [row for part in results.iterdir() for row in table(part).to_pylist()]
    assert sorted(row["path"] for row in rows) == paths
    expected = BatchScorer(names["model"])(pa.table({"path": paths})).to_pylist()
    for row, one in zip(sorted(rows, key=lambda row: row["path"]), expected, strict=True):
        assert_same_row(row, one)

    # All is done: nothing is read, nothing is added.
    before = sorted(results.iterdir())
    run("done = set()")
    assert names["waiting"] == []
    assert sorted(results.iterdir()) == before
