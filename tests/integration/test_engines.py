"""The examples of docs/engines.md as they stand there, with Ray, Spark and Daft on this machine; and going on after a
stop as the page says."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastmsflow.inference import BatchScorer
from tests.helpers.pages import EXAMPLES, Block, run_up_to
from tests.helpers.pages_folder import pages_folder
from tests.helpers.predictions import table
from tests.helpers.same_rows import assert_same_row

pa = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'fastmsflow[shards]'")
pq = pytest.importorskip("pyarrow.parquet")

pytestmark = pytest.mark.slow

OF_PAGE = [block for block in EXAMPLES if block.page.name == "engines.md"]


class KilledOnce(BatchScorer):
    """Ends its process in the middle of the first batch, as for want of memory."""

    def __call__(self, batch):
        results = super().__call__(batch)
        mark = Path(os.environ["KILLED"])
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return results


@pytest.fixture(scope="module")
def folder(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder, with the files that the page names."""
    folder = pages_folder(tmp_path_factory.mktemp("engines"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("KILLED", str(folder / "killed"))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # The Python of Spark's and of Ray's workers, which import this package.
        patch.setenv("PYSPARK_PYTHON", str(python))
        patch.setattr(sys, "executable", str(python))
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        yield folder
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()


@pytest.fixture(scope="module")
def names(folder: Path) -> dict[str, Any]:
    """The variables of the page's examples."""
    return {"run": []}


def test_going_on_writes_what_is_not_there_once_though_a_file_is_cut_off_and_a_worker_killed(
    folder: Path, names: dict[str, Any], noise_images: Path
) -> None:
    pytest.importorskip("ray.data", reason="needs Ray: pip install 'fastmsflow[ray]'")
    run_up_to(next(block for block in OF_PAGE if "ray.init(" in block.text), names)
    (going_on,) = (block.text for block in OF_PAGE if "done = set()" in block.text)
    images, results = sorted(noise_images.iterdir()), folder / "results_going_on"
    paths = [str(image) for image in images]
    results.mkdir()
    written = BatchScorer(names["model"])(pa.table({"path": paths[:6]}))
    pq.write_table(written.slice(0, 4), results / "whole.parquet")
    pq.write_table(written, results / "cut.parquet")
    os.truncate(results / "cut.parquet", 900)

    own = {**names, "images": images, "results": str(results), "BatchScorer": KilledOnce, "parquet": pq}
    exec(going_on, own)
    assert (folder / "killed").exists()
    assert not (results / "cut.parquet").exists()
    rows = [row for part in results.iterdir() for row in table(part).to_pylist()]
    assert sorted(row["path"] for row in rows) == paths
    expected = BatchScorer(names["model"])(pa.table({"path": paths})).to_pylist()
    for row, one in zip(sorted(rows, key=lambda row: row["path"]), expected, strict=True):
        assert_same_row(row, one)

    # All is done: nothing is read, nothing is added.
    before = sorted(results.iterdir())
    exec(going_on, own)
    assert own["waiting"] == []
    assert sorted(results.iterdir()) == before


@pytest.mark.parametrize("example", OF_PAGE, ids=str)
def test_an_example_runs(example: Block, names: dict[str, Any]) -> None:
    run_up_to(example, names)


@pytest.mark.parametrize("engine", ["ray", "spark", "daft"])
def test_an_engine_wrote_a_row_for_each_image_with_the_scores_of_the_scorer(engine: str, folder: Path) -> None:
    """Runs the service by its example above."""
    parts = sorted((folder / f"results_{engine}").glob("*.parquet"))
    if not parts:
        pytest.skip(f"the example of {engine} did not run")
    rows = [row for part in parts for row in table(part).to_pylist()]
    rows.sort(key=lambda row: row["path"])
    # Some call a file file:/...
    rows = [row | {"path": Path(row["path"]).name} for row in rows]
    files = sorted(str(file) for file in (folder / "new_images").iterdir())
    scored = BatchScorer(folder / "runs/mine/best.safetensors")(pa.table({"path": files})).to_pylist()
    for row, one in zip(rows, scored, strict=True):
        assert row.keys() == one.keys()
        assert_same_row(row, one | {"path": Path(one["path"]).name})
