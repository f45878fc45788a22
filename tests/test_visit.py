"""A visit to a GPU, rehearsed at small sizes on a CPU: whole, with a red test, and with every step interrupted."""

import io
import json
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report

ROOT = Path(__file__).parents[1]
FIRST = ("smoke", "kernels", "ours", "compiled", "as-shipped", "training", "kernels-other-batches")
MORE = ("parity", "training-kernels", "compiled-other-batches", "autotuned", "profile", "tune", "sanitizer")
# Seconds after which a step is interrupted, whether it has a row or not.
PATIENCE = 15


def begin(out: Path, *options: str, parity: str = "") -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    own = {"OUT": str(out), "PARITY": parity, "COMMIT": "0123abcd"}
    return subprocess.Popen(
        ["bash", ROOT / "benchmarks/gpu.sh", "--rehearse", *options],
        env=environment | own,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


def record(out: Path, name: str = "record.tgz") -> dict[str, bytes]:
    """The files in it."""
    with tarfile.open(out / name) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar.getmembers()}


def endings(out: Path, name: str = "summary.txt") -> dict[str, str]:
    """{step: how it ended}."""
    head = (out / name).read_text().partition("\n\n")[0]
    return dict(line.split(": ", 1) for line in head.splitlines())


def rows(files: dict[str, bytes], step: str) -> list[dict[str, Any]]:
    return json.loads(files[f"{step}.json"])["benchmarks"] if f"{step}.json" in files else []


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("visit")
    assert begin(out).wait() == 0
    return out


def test_a_whole_visit_leaves_a_record_of_every_step(first: Path) -> None:
    assert {path.name for path in first.iterdir()} == {"record.tgz", "summary.txt"}
    found = endings(first)
    assert tuple(found) == (*FIRST, "report")
    assert {step: end for step, end in found.items() if not end.startswith("done")} == {}
    files = record(first)
    assert {"speed.md", "speed.png", "table.json", "smoke.json", "summary.txt"} <= files.keys()
    assert {f"{step}.log" for step in FIRST} <= files.keys()


def test_every_contestant_is_timed_with_a_green_gate(first: Path) -> None:
    files = record(first)
    timed = [row for step in ("ours", "compiled", "as-shipped", "training") for row in rows(files, step)]
    assert {row["extra_info"]["commit"] for row in timed} == {"0123abcd"}
    gates = [row["extra_info"]["gate"] for row in timed if row["group"] in report.GROUPS]
    assert all(gate["green"] for gate in gates)
    peers = {"as shipped", "as shipped, autocast fp16", "fastmsflow"}
    by_batch = report.by_contestant(timed, "flow inference")
    assert {batch: set(found) for batch, found in by_batch.items()} == {1: peers, 2: {*peers, "compiled bf16"}}
    for group in ("flow training step", "training step"):
        assert set(report.by_contestant(timed, group)[2]) == {*peers, "compiled bf16"}


def test_convolutions_are_timed_by_three_tiles_beside_the_vendors(first: Path) -> None:
    timed = rows(record(first), "kernels")
    for group, cases in zip(report.CONVOLUTIONS, (6, 4), strict=True):
        found = report.by_case([row for row in timed if row["group"] == group])
        assert len(found) == cases
        assert all(len(case) == 4 and report.VENDORS in case for case in found.values())


def test_kernels_are_timed_in_float16_at_every_batch(first: Path) -> None:
    files = record(first)
    kernels = [row for step in ("kernels", "kernels-other-batches") for row in rows(files, step)]
    kernels = [row["extra_info"] for row in kernels if row["group"] == "kernels"]
    assert {info["batch"] for info in kernels} == {1, 2}
    assert {info["arithmetic"] for info in kernels} == {"float16", "float32"}
    names = {"coupling", "layer_norm", "conv3x3", "conv3x3_layer_norm", "conv3x3_coupling", "pool", "upsample"}
    assert {info["kernel"] for info in kernels} == {*names, "likelihood", "score_map", "image_score"}


def test_our_rows_come_batch_by_batch_and_the_flow_first(first: Path) -> None:
    order = [row["name"].split("[")[0] + str(row["extra_info"]["images"]) for row in rows(record(first), "ours")]
    flow, whole = "test_flow_inference", "test_end_to_end_inference"
    assert order[:4] == [f"{flow}2", f"{whole}2", f"{flow}1", f"{whole}1"]


def test_a_red_parity_test_is_named_and_costs_nothing_else(tmp_path: Path) -> None:
    planted = tmp_path / "test_planted.py"
    planted.write_text("def test_that_is_red():\n    assert 1 == 2\n")
    # A test that compares, beside the red one.
    parity = f"{planted} {ROOT}/tests/test_ops_scores.py::test_any_memory_layout"
    out = tmp_path / "out"
    assert begin(out, "--more", parity=parity).wait() == 0
    found = endings(out, "summary-more.txt")
    assert tuple(found) == (*MORE, "report")
    assert found.pop("parity").startswith("failed (exit 1)")
    assert found.pop("tune").startswith("not run")
    assert {step: end for step, end in found.items() if not end.startswith("done")} == {}
    files = record(out, "record-more.tgz")
    tests = json.loads(files["parity.json"])
    assert [test["test"].split("::")[-1] for test in tests if test.get("outcome") == "failed"] == ["test_that_is_red"]
    assert any(test.get("error", 1.0) < test.get("bound", 0.0) for test in tests)
    assert b"test_that_is_red" in files["summary.txt"]


def wait_for(condition: Callable[[], object], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False


def running(out: Path) -> str | None:
    """The step that runs."""
    steps = [step for step, end in endings(out).items() if end.startswith("running")] if out.exists() else []
    return steps[0] if steps else None


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_every_step_may_be_interrupted_and_what_was_measured_is_kept(tmp_path: Path) -> None:
    visit = begin(tmp_path)
    try:
        for step in FIRST:
            assert wait_for(lambda step=step: (tmp_path / "summary.txt").exists() and running(tmp_path) == step, 120)
            wait_for(lambda step=step: f"{step}.json" in record(tmp_path), PATIENCE)
            if step == FIRST[-1]:
                break
            (process,) = children(visit.pid)
            os.killpg(process, signal.SIGINT)
        # The visit itself is killed.
        before = record(tmp_path)
        for process in (*children(visit.pid), visit.pid):
            os.killpg(process, signal.SIGKILL)
    finally:
        visit.wait()
    files = record(tmp_path)
    assert files.keys() >= before.keys()
    found = endings(tmp_path)
    assert {step for step, end in found.items() if end.startswith("interrupted")} == set(FIRST[:-1])
    assert json.loads(files["smoke.json"])
    kept = {step: len(rows(files, step)) for step in ("kernels", "ours", "as-shipped", "training")}
    assert all(kept.values()), kept
    assert io.BytesIO(files["summary.txt"]).read().count(b"flow inference") >= 1
