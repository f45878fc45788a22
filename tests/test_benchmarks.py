"""The benchmark suite: its gates, reports and comparisons. tests/test_visit.py runs the whole of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import CONTESTANT
from typer.testing import CliRunner

from benchmarks import gate, report
from benchmarks.contestants import AsShipped, Contestant, FastMSFlow
from benchmarks.setting import SIZES
from benchmarks.test_speed_flow import features, flops
from fastmsflow import InputError, MSFlow
from fastmsflow.benchmarking.compare import compare
from fastmsflow.cli import app
from fastmsflow.compat import load_official

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of what surrounds the flows, every row run once."""
    out = tmp_path_factory.mktemp("rehearsal") / "speed.json"
    command = ["-m", "pytest", "benchmarks/test_speed_scoring.py", "--benchmark-only", "--size", "small", "--rehearse"]
    # Where these tests run in several processes, the suite must not think that it does.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    run = subprocess.run(
        [sys.executable, *command, "-q", "-p", "no:cacheprovider", f"--benchmark-json={out}"],
        cwd=ROOT,
        env=environment | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    return out


def test_the_surroundings_are_timed_and_said_to_be_rehearsed(rehearsal: Path) -> None:
    machine, rows = report.read([rehearsal])
    assert machine["rehearsal"]
    assert {row["group"] for row in rows} == {"scoring", "metrics", "import"}


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
    flow = load_official(GOLDEN / "odd.pt", clamp=expected["config"]["clamp_alpha"]).to(gate.DEVICE)
    contestant = kind(flow, [tuple(level.shape[2:]) for level in expected["pooled"]])
    pooled = [level.to(gate.DEVICE) for level in expected["pooled"]]
    logp, log_det = contestant.likelihoods([contestant.adapt(level) for level in pooled])
    loss, norm = contestant.step([contestant.adapt_training(level) for level in pooled])
    theirs = [*expected["logp"], expected["logdet"], *map(torch.tensor, expected["trajectory"][0])]
    bound = CONTESTANT["cpu" if gate.DEVICE.type == "cpu" else kind.name]
    assert all(gate.error(a, b) < bound for a, b in zip([*logp, log_det, loss, norm], theirs, strict=True))


def test_a_contestant_that_computes_something_else_has_a_red_gate() -> None:
    class Wrong(FastMSFlow):
        def loss(self, features):
            return 1.01 * super().loss(features)

    model, size = tiny_model(), SIZES["small"]
    truth, given = gate.Truth(model), features(size, 2)
    right, wrong = (gate.step_gate(kind(model.flow, size.grids), truth, given) for kind in (FastMSFlow, Wrong))
    assert right.green
    assert not wrong.green
    assert wrong.errors["first loss"] == pytest.approx(0.01, rel=0.01)
    with pytest.raises(AssertionError, match="first loss"):
        wrong.require()


def test_a_number_that_is_none_has_a_red_gate() -> None:
    assert not gate.Gate({"first loss": float("nan")}, 1.0).green


def test_the_truth_of_a_batch_is_computed_once() -> None:
    truth, given = gate.Truth(tiny_model()), features(SIZES["small"], 2)
    assert truth.likelihoods(given) is truth.likelihoods(given)


def row(name: str, group: str, milliseconds: float, **info: Any) -> dict[str, Any]:
    stats = dict.fromkeys(("median", "q1", "q3"), milliseconds / 1e3)
    return {"name": name, "group": group, "stats": stats, "extra_info": info}


def contest(case: str, whose: str, milliseconds: float, n: int | None = None, **info: Any) -> dict[str, Any]:
    named = {"case": case, "whose": whose, "kernel": "conv3x3_coupling", "tile": n and {"m": 64, "n": n}, "batch": 8}
    more = {"launches": 1, "kind": "conv3x3_coupling", "pixels": 100, "outputs": 256}
    return row(f"{case} {whose}", report.CONVOLUTIONS[1], milliseconds, **named | more | info)


MACHINE = {"device": "a chip", "chip": "sm_90", "threads": 1, "torch": "2", "rehearsal": False}


def test_a_row_whose_gate_is_red_is_named_and_not_published(tmp_path: Path, monkeypatch, capsys) -> None:
    red = {"green": False, "bound": 0.08, "errors": {"log-det": 0.5, "first loss": 0.01}}
    rows = [
        row("ours", "flow inference", 1.0, contestant="fastmsflow", images=8, gate=red),
        row("peer", "flow inference", 2.0, contestant="as shipped", images=8, gate=red | {"green": True}),
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"machine_info": MACHINE, "benchmarks": rows}))
    monkeypatch.setattr(sys, "argv", ["report.py", str(path)])
    report.main()
    table = path.with_name("speed.md").read_text()
    assert "| flow inference | 8 | 2 (2 to 2) |" in table
    assert "ours: log-det 5.0e-01; at most 8.0e-02 is allowed" in table
    assert "first loss" not in table
    assert "not published: ours" in capsys.readouterr().out


def test_kernels_that_are_red_in_the_smoke_test_are_not_published() -> None:
    smoke = [{"kernels": ["coupling"], "arithmetic": "float16", "green": False}]
    rows = [
        row(f"{kernel} {arithmetic}", "kernels", 1.0, kernel=kernel, arithmetic=arithmetic)
        for kernel in ("coupling", "layer_norm")
        for arithmetic in ("float16", "bfloat16")
    ]
    fine, refused = report.published(rows, smoke)
    assert len(fine) == 3
    assert refused == ["coupling float16: red in the smoke test"]


def test_without_a_contestant_there_is_a_report() -> None:
    assert "No contestant was timed" in report.text_of(MACHINE, [], [])
    assert report.chosen(MACHINE, []) == {}


def test_the_fastest_tile_and_convolution_are_chosen() -> None:
    rows = [
        contest("level 0", "vendor's", 2.0),
        contest("level 0", "own 128", 3.0, 128),
        contest("level 0", "own 256", 1.0, 256),
        contest("level 1", "vendor's", 0.5, outputs=512),
        contest("level 1", "own 128", 0.9, 128, outputs=512),
        contest("level 1", "own 256", 1.0, 256, outputs=512),
        # Fast, and timed at one level only.
        contest("level 1", "own 64", 0.1, 64, outputs=512),
    ]
    assert report.chosen(MACHINE, rows) == {
        "sm_90": {
            "tiles": {"conv3x3_coupling": {"m": 64, "n": 256}},
            "convolutions": {"conv3x3_coupling": [(100, 256, True), (100, 512, False)]},
        }
    }
    assert "| level 0 | 8 | 1000 | 256 | 2000 | 0.50 |" in report.kernel_table(rows)


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
