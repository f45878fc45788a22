"""Tuning, at shapes that the interpreter can afford and by a clock that says what the test wants it to."""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastmsflow import InputError, UnavailableError, backend, kernels
from fastmsflow.benchmarking import (
    ConvolutionTiming,
    TileChoice,
    as_table,
    kernel_cases,
    save_table,
    tile_search,
    tune,
)
from fastmsflow.cli import app
from fastmsflow.kernels import configs
from fastmsflow.kernels.launch import Tile
from tests.helpers.ops_parity import DEVICE

CHIP = configs.chip(torch.device(DEVICE))
LEVELS = ((4, 2), (8, 1))


@pytest.fixture(autouse=True)
def own_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("TILES", "PRODUCT_TILES", "CONVOLUTIONS"):
        monkeypatch.setattr(configs, name, deepcopy(getattr(configs, name)))
    return


def only(monkeypatch: pytest.MonkeyPatch, *kernels: str) -> None:
    """The others' cases are left out."""
    monkeypatch.setattr(
        tile_search, "kernel_cases", lambda *shapes: (c for c in kernel_cases(*shapes) if c.tiles in kernels)
    )


@pytest.mark.slow
def test_the_fastest_candidate_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def clock(call) -> float:
        """Fastest at 16 rows of the coupling, on 2 warps."""
        if not torch.is_grad_enabled():  # A convolution: the tiles' launches have run already.
            call()
        size = configs.tile("coupling", torch.device(DEVICE))
        return 1.0 + abs(size.pixels - 16) + abs(size.warps - 2)

    only(monkeypatch, "coupling", "conv3x3_layer_norm", "image_score")
    results = list(tune(torch.device(DEVICE), timer=clock, levels=LEVELS, batches=(1,), image_size=8))
    choices = {r.kernel: r for r in results if isinstance(r, TileChoice)}
    assert choices["coupling"].after == Tile(16, 256, 2)
    assert choices["coupling"].speedup > 1
    assert configs.tile("coupling", torch.device(DEVICE)) == choices["coupling"].after
    assert all(c.after == c.before for c in choices.values() if c.kernel != "coupling")
    contests = [r for r in results if isinstance(r, ConvolutionTiming)]
    assert len(contests) == len(configs.KINDS) * len(LEVELS)
    table = as_table(CHIP, results)
    assert table[CHIP]["tiles"]["coupling"]["pixels"] == 16
    assert {len(rows) for rows in table[CHIP]["convolutions"].values()} == {len(LEVELS)}


def test_a_tile_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmsflow.kernels import layer_norm

    launcher = layer_norm.layer_norm_relu

    def wrong(x, *rest, **options):
        """Wrong on any tile but the committed one."""
        out = launcher(x, *rest, **options)
        if configs.tile("layer_norm", x.device) != Tile(64, 256):
            out[0].mul_(1.1)
        return out

    def clock(call) -> float:
        return 1.0 if configs.tile("layer_norm", torch.device(DEVICE)) == Tile(64, 256) else 0.1

    monkeypatch.setattr(layer_norm, "layer_norm_relu", wrong)
    only(monkeypatch, "layer_norm")
    configs.TILES["layer_norm"][CHIP] = Tile(64, 256)
    results = tune(torch.device(DEVICE), timer=clock, levels=LEVELS, batches=(1,), image_size=8)
    choice = next(r for r in results if isinstance(r, TileChoice) and r.kernel == "layer_norm")
    assert choice.after == choice.before


def test_every_kernel_of_the_table_has_a_case() -> None:
    kernels = {case.tiles for case in kernel_cases(LEVELS, 1, 8, torch.device("meta"))}
    assert kernels == configs.TILES.keys() | configs.PRODUCT_TILES.keys()


def test_every_kernel_of_the_table_has_candidates_that_a_users_table_may_hold() -> None:
    assert configs.TUNING_CANDIDATES.keys() == configs.TILES.keys() | configs.PRODUCT_TILES.keys()
    for kernel, sizes in configs.TUNING_CANDIDATES.items():
        for size in sizes:
            configs.apply({"sm_70": {"tiles": {kernel: asdict(size)}}})


def test_the_nearest_timed_shape_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "chip", lambda device: "sm_90")
    device = torch.device(DEVICE)
    assert not configs.own_convolution_is_faster("conv3x3", 4096, 256, device)
    configs.apply({"sm_90": {"convolutions": {"conv3x3": [[4096, 256, True], [32768, 1024, False]]}}})
    assert configs.own_convolution_is_faster("conv3x3", 5000, 300, device)
    assert not configs.own_convolution_is_faster("conv3x3", 32768, 700, device)
    assert not configs.own_convolution_is_faster("conv3x3_coupling", 4096, 256, device)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's table, which the next import of ``fastmsflow.kernels.configs`` reads."""
    table = tmp_path / "table.json"
    monkeypatch.setenv("FASTMSFLOW_TABLE", str(table))
    monkeypatch.delitem(sys.modules, configs.__name__)
    monkeypatch.delattr(kernels, "configs")
    return table


def test_a_users_table_lies_over_the_committed_one(table: Path) -> None:
    tiles = {"coupling": {"pixels": 2, "channels": 4, "warps": 8}}
    table.write_text(json.dumps({"any": {"tiles": tiles, "convolutions": {"conv3x3": [[1, 2, True]]}}}))
    anew = importlib.import_module(configs.__name__)
    assert anew is not configs
    assert anew.TILES["coupling"]["any"] == Tile(2, 4, 8)
    assert anew.TILES["pool"]["any"] == Tile(16, 128, 4)
    assert anew.CONVOLUTIONS == {"any": {"conv3x3": [(1, 2, True)]}}


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[1]",
        '{"sm_90": {"tiles": {"matmul": {}}}}',
        '{"sm_90": {"tiles": {"coupling": {"m": 16, "n": 16}}}}',
        '{"sm_90": {"tiles": {"coupling": {"pixels": 24, "channels": 4, "warps": 8}}}}',
        '{"sm_90": {"convolutions": {"conv5x5": []}}}',
        "[" * 100_000,
        "9" * 5000,
        "null",
        '{"sm_90": 5}',
        '{"sm_90": {"tiles": []}}',
        '{"sm_90": {"tiles": {"coupling": 5}}}',
        '{"sm_90": {"tiles": {"coupling": {"pixels": true, "channels": 4, "warps": 8}}}}',
        '{"sm_90": {"tiles": {"coupling": {"pixels": 1e999, "channels": 4, "warps": 8}}}}',
        f'{{"sm_90": {{"tiles": {{"coupling": {{"pixels": {2**40}, "channels": 4, "warps": 8}}}}}}}}',
        f'{{"sm_90": {{"tiles": {{"{"x" * 10**6}": {{}}}}}}}}',
        '{"sm_90": {"convolutions": {"conv3x3": 5}}}',
        '{"sm_90": {"convolutions": {"conv3x3": [[1, 2]]}}}',
        '{"sm_90": {"convolutions": {"conv3x3": [[0, 2, true]]}}}',
        '{"sm_90": {"convolutions": {"conv3x3": [[1e999, 2, true]]}}}',
        '{"sm_90": {"convolutions": {"conv3x3": [["1", 2, "no"]]}}}',
    ],
    ids=lambda content: content[:60],
)
def test_a_damaged_table_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    table = tmp_path / "table.json"
    table.write_text(content)
    monkeypatch.setenv("FASTMSFLOW_TABLE", str(table))
    with pytest.raises(ValueError, match=f"{table}: .*delete it") as caught:
        configs.read_user_table()
    assert len(str(caught.value)) < 1000


def test_a_damaged_table_is_an_input_error_of_the_library(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table.write_text("{")
    monkeypatch.setattr(backend, "_faults", {})
    with pytest.raises(InputError, match=re.escape(str(table))):
        backend.uses_triton("triton", torch.zeros(1))


def test_the_command_keeps_what_it_found_beside_other_chips_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "folder" / "table.json"
    monkeypatch.setenv("FASTMSFLOW_TABLE", str(table))
    other = {"sm_70": {"tiles": {}, "convolutions": {"conv3x3": [[1, 2, False]]}}}
    save_table(other)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    found = [
        TileChoice(kernel="coupling", before=Tile(1, 1), after=Tile(2, 4), speedup=1.25),
        ConvolutionTiming(kind="conv3x3", pixels=64, outputs=8, own=1.0, vendor=2.0),
    ]
    monkeypatch.setattr("fastmsflow.benchmarking.tune", lambda *_, progress: progress("coupling", 0, 2) or found)
    run = CliRunner().invoke(app, ["benchmark", "--tune"])
    assert run.exit_code == 0, run.output
    assert "1.25x" in run.output
    user_table = configs.read_user_table()
    assert user_table["sm_70"] == other["sm_70"]
    chip = user_table[configs.chip(torch.device("cuda", 0))]
    assert chip["tiles"] == {"coupling": {"pixels": 2, "channels": 4, "warps": 4}}
    assert chip["convolutions"] == {"conv3x3": [[64, 8, True]]}


def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    error = CliRunner().invoke(app, ["benchmark", "--tune"]).exception
    assert isinstance(error, UnavailableError)
    assert "GPU" in str(error)
