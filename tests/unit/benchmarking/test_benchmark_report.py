"""The report of the benchmark suite: wrong numbers are named and left out, the fastest tiles are chosen."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report


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


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "rows.json: No such file or directory"),
        ("# Speed", "rows.json: not results of the suite of one machine (Expecting value"),
        ("[]", "rows.json: not results of the suite of one machine ("),
        ("{}", "rows.json: not results of the suite of one machine ('machine_info')"),
    ],
)
def test_a_file_without_results_costs_one_line(
    content: str | None, line: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    path = tmp_path / "rows.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(sys, "argv", ["report.py", str(path)])
    with pytest.raises(SystemExit):
        report.main()
    assert line in capsys.readouterr().err
    assert not path.with_name("speed.md").exists()


def peers() -> list[dict[str, Any]]:
    times = {
        ("fastmsflow", "float32"): 2.0,
        ("fastmsflow bfloat16", "bfloat16"): 1.0,
        ("as shipped", "float32"): 6.0,
        ("OpenVINO", "float32"): 3.0,
        ("OpenVINO bfloat16", "bfloat16"): 1.5,
    }
    return [
        row(name, "flow inference", time, contestant=name, images=1, precision=precision)
        for (name, precision), time in times.items()
    ]


def test_precisions_stand_in_the_headings_and_ours_comes_last() -> None:
    table = report.speed_table(MACHINE, peers())
    names = ("as shipped (float32)", "OpenVINO (float32)", "OpenVINO (bfloat16)")
    assert f"| {' | '.join(names)} | fastmsflow (float32) | fastmsflow (bfloat16) |" in table


def test_a_peer_is_compared_with_ours_in_its_own_precision() -> None:
    table = report.speed_table(MACHINE, peers())
    assert (
        "6 (6 to 6), **3.00x** | 3 (3 to 3), **1.50x** | 1.5 (1.5 to 1.5), **1.50x** | 2 (2 to 2) | 1 (1 to 1) |"
        in table
    )
    alone = [row for row in peers() if row["name"] != "fastmsflow bfloat16"]
    assert "1.5 (1.5 to 1.5), **0.75x** | 2 (2 to 2) |" in report.speed_table(MACHINE, alone)


def test_the_best_of_the_float32_peers_is_named_below() -> None:
    assert "| flow inference | 1 | OpenVINO | **1.50x** |" in report.speed_table(MACHINE, peers())
    single = [row for row in peers() if row["name"] in ("fastmsflow", "as shipped", "OpenVINO bfloat16")]
    assert "best of the float32 peers" not in report.speed_table(MACHINE, single)


def test_a_peer_whose_gate_is_red_is_no_ones_best() -> None:
    rows = peers()
    rows[3]["extra_info"]["gate"] = {"green": False, "bound": 1e-5, "errors": {"log-det": 1e-3}}
    fine, refused = report.published(rows)
    assert refused == ["OpenVINO: log-det 1.0e-03; at most 1.0e-05 is allowed"]
    table = report.speed_table(MACHINE, fine)
    assert "OpenVINO (float32)" not in table
    assert "best of the float32 peers" not in table


def test_the_header_names_the_chips_units_and_the_runtimes_versions() -> None:
    machine = MACHINE | {"units": ["AVX512", "AMX-BF16"], "onnxruntime": "1.18.0", "openvino": "2025.1.0"}
    first = report.speed_table(machine, peers()).partition("\n")[0]
    assert first == "a chip, AVX512, AMX-BF16, 1 threads; torch 2, onnxruntime 1.18.0, openvino 2025.1.0."


def test_kernels_that_are_not_green_in_the_smoke_test_are_not_published() -> None:
    each = [{"arithmetic": "float16"}, {"arithmetic": "bfloat16"}]
    smoke = [{"kernels": ["coupling"], "arithmetic": "float16", "green": False}]
    rows = [
        row(f"{kernel} {arithmetic}", "kernels", 1.0, kernel=kernel, arithmetic=arithmetic)
        for kernel in ("coupling", "layer_norm")
        for arithmetic in ("float16", "bfloat16")
    ]
    fine, refused = report.published(rows, [*smoke, *({"kernels": ["coupling"], "green": True} | a for a in each)])
    assert [row["name"] for row in fine] == ["coupling bfloat16"]
    assert refused == [
        "coupling float16: red in the smoke test",
        "layer_norm float16: no smoke test",
        "layer_norm bfloat16: no smoke test",
    ]


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
        # Cut off before 256's turn.
        contest("level 2", "vendor's", 0.5, outputs=1024),
        contest("level 2", "own 128", 0.1, 128, outputs=1024),
    ]
    assert report.chosen(MACHINE, rows) == {
        "sm_90": {
            "tiles": {"conv3x3_coupling": {"m": 64, "n": 256}},
            "convolutions": {"conv3x3_coupling": [(100, 256, True), (100, 512, False)]},
        }
    }
    assert "| level 0 | 8 | 1000 | 256 | 2000 | 0.50 |" in report.kernel_table(rows)
