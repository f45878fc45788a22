"""The benchmark suite: it runs, at small sizes and without a GPU; it times nothing that is wrong; it reports and
compares."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import gate, report
from benchmarks.contestants import AsShipped, FastMSFlow
from benchmarks.setting import SIZES
from benchmarks.test_speed_flow import flops
from fastmsflow import InputError
from fastmsflow.benchmarking.compare import compare
from fastmsflow.cli import app

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the whole suite, every row run once; of the kernels, which the interpreter runs elsewhere, one."""
    out = tmp_path_factory.mktemp("rehearsal") / "speed.json"
    command = ["-m", "pytest", "benchmarks", "--benchmark-only", "--size", "small", "--rehearse", "-q"]
    chosen = ["-k", "not test_kernel and not test_convolution or test_kernel and 8 or head and vendor"]
    # Where these tests run in several processes, the suite must not think that it does.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    run = subprocess.run(
        [sys.executable, *command, *chosen, "-p", "no:cacheprovider", f"--benchmark-json={out}"],
        cwd=ROOT,
        env=environment | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    return out


def test_every_group_is_run_with_every_contestant(rehearsal: Path) -> None:
    machine, rows = report.read([rehearsal])
    assert machine["rehearsal"]
    assert {row["group"] for row in rows} >= {*report.GROUPS, "the chip", "kernels", "scoring", "metrics", "import"}
    names = {"as shipped", "as shipped, autocast fp16", "compiled bf16", "fastmsflow"}
    for group in report.GROUPS:
        for found in report.by_contestant(rows, group).values():
            assert found.keys() == names
    timed = [row["extra_info"].keys() for row in rows if row["group"] in report.GROUPS]
    assert all({"torch", "triton", "commit", "device"} <= keys for keys in timed)


def test_tables_and_plot_are_made(rehearsal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["report.py", str(rehearsal)])
    report.main()
    table = rehearsal.with_name("speed.md").read_text()
    assert "A rehearsal" in table
    assert "| flow inference | 2 |" in table
    assert "Measured limits" in table
    assert rehearsal.with_name("speed.png").stat().st_size > 10_000


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


@pytest.mark.parametrize("kind", [AsShipped, FastMSFlow], ids=lambda kind: kind.name)
def test_contestants_reproduce_the_recording(kind) -> None:
    gate.check(kind)


def test_a_contestant_that_computes_something_else_is_not_timed() -> None:
    class Wrong(FastMSFlow):
        def loss(self, features):
            return 1.01 * super().loss(features)

    with pytest.raises(AssertionError, match="first loss"):
        gate.check(Wrong)


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


def test_results_of_two_machines_come_with_a_warning(tmp_path: Path) -> None:
    old, new = results(tmp_path / "old.json", flow=1.0), results(tmp_path / "new.json", "another", flow=1.0)
    ratios, warning = compare(old, new)
    assert [ratio.value for ratio in ratios] == [1.0]
    assert "a chip" in warning
    assert "another" in warning


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
