"""The benchmark suite: its gates, reports and comparisons; and a visit to a GPU, rehearsed at small sizes on a CPU:
whole, with a red test, and with every step interrupted."""

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from typer.testing import CliRunner

from benchmarks import gpu_visit, parity_gate, report
from benchmarks.contestants import AsShipped, Compiled, Contestant, FastMSFlow
from benchmarks.suite_settings import SIZES
from benchmarks.test_speed_flow import features, flops
from fastmsflow import InputError, MSFlow
from fastmsflow.benchmarking.compare import compare
from fastmsflow.cli import app
from fastmsflow.compat import load_official
from tests.helpers.paths import GOLDEN, ROOT
from tests.helpers.tolerances import CONTESTANT

FIRST = ("smoke", "kernels", "ours", "compiled", "as-shipped", "training", "kernels-other-batches")
MORE = ("parity", "smoke", "training-kernels", "compiled-other-batches", "autotuned", "profile", "tune", "sanitizer")
# Steps that are interrupted once they have measured something, for which they have so many seconds; the others at once.
MEASURED, PATIENCE = ("smoke", "kernels", "ours"), 120


@pytest.fixture(scope="module")
def rehearsal(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of what surrounds the flows, every row run once."""
    out = tmp_path_factory.mktemp("rehearsal") / "speed.json"
    command = ["-m", "pytest", "benchmarks/test_speed_scoring.py", "--benchmark-only", "--size", "small", "--rehearse"]
    # These tests may run in several processes; the suite must not think that it does.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    run = subprocess.run(
        [python, *command, "-q", "-p", "no:cacheprovider", f"--benchmark-json={out}"],
        cwd=ROOT,
        env=environment | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    return out


@pytest.mark.slow
def test_the_surroundings_are_timed_and_said_to_be_rehearsed(rehearsal: Path) -> None:
    machine, rows = report.read([rehearsal])
    assert machine["rehearsal"]
    assert {row["group"] for row in rows} == {"scoring", "metrics", "import"}


@pytest.mark.slow
def test_a_rehearsal_does_not_enter_the_readme(rehearsal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = report.README.read_text()
    monkeypatch.setattr(sys, "argv", ["report.py", str(rehearsal), "--readme"])
    with pytest.raises(SystemExit):
        report.main()
    assert report.README.read_text() == before


def test_the_readmes_table_stands_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before\n{report.MARKERS[0]}\nold\n{report.MARKERS[1]}\nafter\n")
    report.put_into(page, "new\n")
    assert page.read_text() == f"before\n{report.MARKERS[0]}\nnew\n{report.MARKERS[1]}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="lacks"):
        report.put_into(page, "new\n")


def tiny_model() -> MSFlow:
    torch.manual_seed(0)
    size = SIZES["small"]
    return MSFlow(size.extractor, pretrained=False, image_size=(64, 64), blocks=size.blocks).eval()


@pytest.mark.parametrize("kind", [AsShipped, FastMSFlow], ids=lambda kind: kind.name)
def test_contestants_reproduce_the_recording(kind: type[Contestant]) -> None:
    expected = torch.load(GOLDEN / "odd_expected.pt", weights_only=True)
    flow = load_official(GOLDEN / "odd.pt", clamp=expected["config"]["clamp_alpha"]).to(parity_gate.DEVICE)
    contestant = kind(flow, [tuple(level.shape[2:]) for level in expected["pooled"]])
    pooled = [level.to(parity_gate.DEVICE) for level in expected["pooled"]]
    logp, log_det = contestant.likelihoods([contestant.adapt(level) for level in pooled])
    loss, norm = contestant.step([contestant.adapt_training(level) for level in pooled])
    theirs = [*expected["logp"], expected["logdet"], *map(torch.tensor, expected["trajectory"][0])]
    bound = CONTESTANT["cpu" if parity_gate.DEVICE.type == "cpu" else kind.name]
    assert all(parity_gate.error(a, b) < bound for a, b in zip([*logp, log_det, loss, norm], theirs, strict=True))


def test_a_contestant_that_computes_something_else_has_a_red_gate() -> None:
    class Wrong(FastMSFlow):
        def loss(self, features):
            return 1.01 * super().loss(features)

    model, size = tiny_model(), SIZES["small"]
    reference, given = parity_gate.Reference(model), features(size, 2)
    right, wrong = (
        parity_gate.step_gate(kind(model.flow, size.grids), reference, given) for kind in (FastMSFlow, Wrong)
    )
    assert right.green
    assert not wrong.green
    assert wrong.errors["first loss"] == pytest.approx(0.01, rel=0.01)
    with pytest.raises(AssertionError, match="first loss"):
        wrong.require()


def test_a_number_that_is_none_has_a_red_gate() -> None:
    assert not parity_gate.Gate({"first loss": float("nan")}, 1.0).green


def test_the_compiled_peers_weights_are_constants_of_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    counter, by_options = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, fullgraph, options: by_options(f, fullgraph=True, backend=counter))
    layer = torch.nn.Linear(3, 3).requires_grad_(False)
    with torch.no_grad():
        for frozen, inputs in ((True, 1), (False, 3)):
            torch._dynamo.reset()
            Compiled.compile(layer.forward, frozen)(torch.ones(1, 3))
            assert len(counter.graphs[-1].graph.find_nodes(op="placeholder")) == inputs


def test_the_truth_of_a_batch_is_computed_once() -> None:
    reference, given = parity_gate.Reference(tiny_model()), features(SIZES["small"], 2)
    assert reference.likelihoods(given) is reference.likelihoods(given)


def test_the_default_flow_takes_84_gigaflop_an_image() -> None:
    """The count of the method's description, the permutations and the condition's share left out."""
    assert flops(SIZES["default"]) == pytest.approx(84.3e9, rel=0.01)


def results(path: Path, device: str = "a chip", **medians: float) -> Path:
    rows = [{"fullname": name, "stats": {"median": median}} for name, median in medians.items()]
    path.write_text(json.dumps({"machine_info": {"device": device}, "benchmarks": rows}))
    return path


def test_a_slower_row_is_named_and_the_exit_code_says_so(tmp_path: Path) -> None:
    old = results(tmp_path / "old.json", flow=1.0, score=2.0, gone=1.0)
    new = results(tmp_path / "new.json", flow=1.05, score=3.0, fresh=1.0)
    arguments = ["benchmark", "--compare", str(old), "--results", str(new)]
    run = CliRunner().invoke(app, arguments)
    assert run.exit_code == 1
    assert "1 of 2" in run.output
    assert "1.500" in run.output
    assert CliRunner().invoke(app, [*arguments, "--threshold", "1.6"]).exit_code == 0


def test_results_alone_are_refused(tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["benchmark", "--results", str(results(tmp_path / "new.json", flow=1.0))])
    assert run.exit_code == 1
    assert "give --compare FILE too" in str(run.exception)


def test_results_of_two_machines_come_with_a_warning(tmp_path: Path) -> None:
    old, new = results(tmp_path / "old.json", flow=1.0), results(tmp_path / "new.json", "another", flow=1.0)
    ratios, (warning,) = compare(old, new)
    assert [ratio.value for ratio in ratios] == [1.0]
    assert "a chip" in warning
    assert "another" in warning


def test_what_the_baseline_alone_has_is_named(tmp_path: Path) -> None:
    old = results(tmp_path / "old.json", flow=1.0, scoring=1.0, metric=1.0)
    ratios, warnings = compare(old, results(tmp_path / "new.json", scoring=1.0, another=1.0))
    assert len(ratios) == 1
    assert len(warnings) == 1
    assert warnings[0].startswith("2 of 3 benchmarks of the baseline are not in the results: ")
    assert "flow" in warnings[0]
    assert "metric" in warnings[0]


@pytest.mark.parametrize("content", ["{", "[]", '{"machine_info": {}, "benchmarks": []}'])
def test_what_is_no_result_is_refused(tmp_path: Path, content: str) -> None:
    good, bad = results(tmp_path / "good.json", flow=1.0), tmp_path / "bad.json"
    bad.write_text(content)
    with pytest.raises(InputError, match=r"bad\.json"):
        compare(good, bad)
    with pytest.raises(InputError, match="no such file"):
        compare(good, tmp_path / "missing.json")
    with pytest.raises(InputError, match="in common"):
        compare(good, results(tmp_path / "other.json", other=1.0))


@pytest.fixture(scope="module")
def visitor(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ``python`` that is a real one and runs its own programs, a visit's steps, by the fast one."""
    folder = tmp_path_factory.mktemp("visitor")
    code = f"import runpy, sys; sys.executable = {str(python)!r}; del sys.argv[0]; "
    code += "runpy.run_path(sys.argv[0], None, '__main__')"
    (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -c {shlex.quote(code)} "$@"\n')
    (folder / "python").chmod(0o755)
    return folder


def begin(visitor: Path, out: Path, *options: str, parity: str = "") -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    path = f"{visitor}{os.pathsep}{os.environ['PATH']}"
    own = {"OUT": str(out), "PARITY": parity, "COMMIT": "0123abcd", "PATH": path}
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


def rows_of(files: dict[str, bytes], step: str) -> list[dict[str, Any]]:
    return json.loads(files[f"{step}.json"])["benchmarks"] if f"{step}.json" in files else []


@pytest.fixture(scope="module")
def first(visitor: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("visit")
    assert begin(visitor, out).wait() == 0
    return out


@pytest.mark.slow
def test_a_whole_visit_leaves_a_record_of_every_step(first: Path) -> None:
    assert {path.name for path in first.iterdir()} == {"record.tgz", "summary.txt"}
    found = endings(first)
    assert tuple(found) == (*FIRST, "report")
    assert {step: end for step, end in found.items() if not end.startswith("done")} == {}
    files = record(first)
    assert {"speed.md", "speed.png", "table.json", "smoke.json", "summary.txt"} <= files.keys()
    assert {f"{step}.log" for step in FIRST} <= files.keys()


@pytest.mark.slow
def test_every_contestant_is_timed_with_a_green_gate(first: Path) -> None:
    files = record(first)
    timed = [row for step in ("ours", "compiled", "as-shipped", "training") for row in rows_of(files, step)]
    assert {row["extra_info"]["commit"] for row in timed} == {"0123abcd"}
    gates = [row["extra_info"]["gate"] for row in timed if row["group"] in report.GROUPS]
    assert all(gate["green"] for gate in gates)
    peers = {"as shipped", "as shipped, autocast fp16", "fastmsflow"}
    by_batch = report.by_contestant(timed, "flow inference")
    assert {batch: set(found) for batch, found in by_batch.items()} == {1: peers, 2: {*peers, "compiled bf16"}}
    for group in ("flow training step", "training step"):
        assert set(report.by_contestant(timed, group)[2]) == {*peers, "compiled bf16"}


@pytest.mark.slow
def test_convolutions_are_timed_by_three_tiles_beside_the_vendors(first: Path) -> None:
    timed = rows_of(record(first), "kernels")
    for group, cases in zip(report.CONVOLUTIONS, (3, 2), strict=True):
        found = report.by_case([row for row in timed if row["group"] == group])
        assert len(found) == cases
        assert all(len(case) == 4 and report.VENDORS in case for case in found.values())


@pytest.mark.slow
def test_kernels_are_timed_in_float16_at_every_batch(first: Path) -> None:
    files = record(first)
    kernels = [row for step in ("kernels", "kernels-other-batches") for row in rows_of(files, step)]
    kernels = [row["extra_info"] for row in kernels if row["group"] == "kernels"]
    assert {info["batch"] for info in kernels} == {1, 2}
    assert {info["arithmetic"] for info in kernels} == {"float16", "float32"}
    names = {"coupling", "layer_norm", "conv3x3", "conv3x3_layer_norm", "conv3x3_coupling", "pool", "upsample"}
    assert {info["kernel"] for info in kernels} == {*names, "likelihood", "reflection_pad", "score_map", "image_score"}


@pytest.mark.slow
def test_our_rows_come_batch_by_batch_and_the_flow_first(first: Path) -> None:
    order = [row["name"].split("[")[0] + str(row["extra_info"]["images"]) for row in rows_of(record(first), "ours")]
    flow, whole = "test_flow_inference", "test_end_to_end_inference"
    assert order[:4] == [f"{flow}2", f"{whole}2", f"{flow}1", f"{whole}1"]


@pytest.mark.slow
def test_a_red_parity_test_is_named_and_costs_nothing_else(visitor: Path, tmp_path: Path) -> None:
    planted = tmp_path / "test_planted.py"
    planted.write_text("def test_that_is_red():\n    assert 1 == 2\n")
    # A test that compares, beside the red one.
    parity = f"{planted} {ROOT}/tests/unit/ops/test_scores.py::test_any_memory_layout"
    out = tmp_path / "out"
    assert begin(visitor, out, "--more", parity=parity).wait() == 0
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


def test_the_report_has_its_time_whatever_steps_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_visit, "LEAST", 0.5)
    (tmp_path / "out").mkdir()
    (tmp_path / "scratch").mkdir()
    run = gpu_visit.Visit(tmp_path / "out", tmp_path / "scratch", gpu_visit.RESERVE + 1)
    for name, seconds in (("slow", 60), ("later", 0), ("report", 0)):
        command = [sys.executable, "-c", f"import time; time.sleep({seconds})"]
        run.run(gpu_visit.Step(name, 60, command), sure=name == "report")
    found = endings(tmp_path / "out")
    assert found["slow"].startswith("interrupted at its limit of 1 s")
    assert found["later"] == "not run, no time was left"
    assert found["report"].startswith("done")


def test_a_result_that_cannot_be_read_costs_the_summary_alone(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('{"benchmarks": [1], "machine_info": {}}')
    run = gpu_visit.Visit(tmp_path / "out", tmp_path, 60)
    run.say("smoke: done")
    assert "smoke: done\n\nno summary: " in (tmp_path / "out/summary.txt").read_text()
    assert "rows.json" in record(tmp_path / "out")


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


@pytest.mark.slow
def test_every_step_may_be_interrupted_and_what_was_measured_is_kept(visitor: Path, tmp_path: Path) -> None:
    visit = begin(visitor, tmp_path)
    try:
        for step in FIRST:
            assert wait_for(lambda step=step: (tmp_path / "summary.txt").exists() and running(tmp_path) == step, 120)
            # Known before it has measured: it may end at any moment then, and the next one begin.
            assert wait_for(lambda: children(visit.pid), 10)
            (process,) = children(visit.pid)
            if step in MEASURED:
                assert wait_for(lambda step=step: f"{step}.json" in record(tmp_path), PATIENCE)
            if step == FIRST[-1]:
                break
            # While Python imports, a signal may be lost: it is sent again where nothing came of it.
            for _ in range(60):
                with suppress(ProcessLookupError):
                    os.killpg(process, signal.SIGINT)
                if wait_for(lambda step=step: running(tmp_path) != step, 1):
                    break
        # The visit itself is killed.
        before = record(tmp_path)
        for process in (visit.pid, *children(visit.pid)):
            os.killpg(process, signal.SIGKILL)
    finally:
        visit.wait()
    files = record(tmp_path)
    assert files.keys() >= before.keys()
    found = endings(tmp_path)
    # Small as they are here, a step that was let measure may have ended before the signal came. One that was not may
    # still import: some extensions turn the interrupt into an error of their own.
    for step in FIRST[:-1]:
        assert found[step].split()[0] in ("interrupted", "done" if step in MEASURED else "failed")
    assert json.loads(files["smoke.json"])
    assert rows_of(files, "kernels")
    assert rows_of(files, "ours")
    assert io.BytesIO(files["summary.txt"]).read().count(b"flow inference") >= 1
