"""The suite on a CPU: every runtime passes the gate at a small size, is timed in turns and stands in the table."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import report
from benchmarks.contestants import CONTESTANTS, Contestant
from benchmarks.cpu_contestants import (
    CPU_CONTESTANTS,
    NO_BFLOAT16,
    ONNXRuntime,
    OpenVINOBfloat16,
    OpenVINOFloat32,
    TorchCompile,
)
from benchmarks.exports import Exports
from benchmarks.runtimes import not_installed, onnx_runtime
from benchmarks.suite_settings import SIZES
from benchmarks.test_speed_flow import features
from fastmsflow import MSFlow
from tests.helpers.paths import ROOT
from tests.helpers.tolerances import EXPORTED

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="contestants take turns on a CPU only"),
]

SUITE = ("benchmarks/test_speed_flow.py", "benchmarks/test_speed_end_to_end.py")
KINDS = [kind for kind in (*CONTESTANTS, *CPU_CONTESTANTS) if not kind.gpu_only]


def rehearse(python: Path, *options: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs the suite once at a small size."""
    # These tests may run in several processes; the suite must not think that it does.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    command = ["-m", "pytest", "--benchmark-only", "--size", "small", "--rehearse", "-q", "-rs", *options]
    return subprocess.run(
        [python, *command, "-p", "no:cacheprovider", "--batches", "1"],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)} | more,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def rows(python: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("peers") / "speed.json"
    names = [word for kind in KINDS for word in ("--contestant", kind.name)]
    run = rehearse(python, *SUITE, *names, f"--benchmark-json={out}")
    assert run.returncode == 0, run.stdout[-3000:]
    return json.loads(out.read_text())["benchmarks"]


def test_every_peer_that_can_run_here_is_timed_with_a_green_gate(rows: list[dict[str, Any]]) -> None:
    can_run = {kind.name for kind in KINDS if kind.missing() is None}
    for group in ("flow inference", "end-to-end inference"):
        found = report.by_contestant(rows, group)[1]
        assert set(found) == can_run
        assert all(row["extra_info"]["gate"]["green"] for row in found.values())


def test_inference_only_peers_take_no_part_in_training(rows: list[dict[str, Any]]) -> None:
    trained = {kind.name for kind in KINDS if kind.trains and kind.missing() is None}
    assert "fastmsflow" in trained
    for group in ("flow training step", "training step"):
        assert set(report.by_contestant(rows, group)[2]) == trained


def test_each_row_states_the_precision_of_its_arithmetic(rows: list[dict[str, Any]]) -> None:
    stated = {row["extra_info"]["contestant"]: row["extra_info"]["precision"] for row in rows}
    assert stated == {name: "bfloat16" if "bfloat16" in name else "float32" for name in stated}


@pytest.mark.skipif(OpenVINOFloat32.missing() is not None, reason="needs OpenVINO")
def test_a_peer_that_is_not_installed_is_skipped_with_one_line(python: Path, tmp_path: Path) -> None:
    (tmp_path / "hide_openvino.py").write_text("import sys\n\nsys.modules['openvino'] = None\n")
    path = os.pathsep.join((str(ROOT), str(tmp_path)))
    options = ("-p", "hide_openvino", "--contestant", "OpenVINO", "-k", "flow_inference")
    run = rehearse(python, SUITE[0], *options, PYTHONPATH=path)
    assert "not installed: openvino; pip install openvino" in run.stdout
    assert "1 skipped" in run.stdout


def test_bfloat16_is_skipped_on_a_chip_without_units_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if OpenVINOFloat32.missing() is not None:
        pytest.skip("needs OpenVINO")
    import openvino

    monkeypatch.setattr(openvino.Core, "get_property", lambda *names: ["FP32", "INT8"])
    assert OpenVINOBfloat16.missing() == NO_BFLOAT16
    monkeypatch.setattr(openvino.Core, "get_property", lambda *names: ["FP32", "BF16"])
    assert OpenVINOBfloat16.missing() is None


@pytest.mark.skipif(not_installed("onnx", "onnxscript", "onnxruntime") is not None, reason="needs the onnx extra")
def test_runtimes_get_the_flow_with_plain_convolutions_and_the_condition_computed(tmp_path: Path) -> None:
    import onnx

    size = SIZES["small"]
    torch.manual_seed(0)
    image = (size.image, size.image)
    model = MSFlow(size.extractor, pretrained=False, image_size=image, blocks=size.blocks).eval()
    path = Exports(model, size.grids, tmp_path).flow
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    # Two a block, and of each half of the fusion two and the three levels' heads.
    assert kinds.count("Conv") == 2 * sum(size.blocks) + 2 * (2 + 3)
    given = features(size, 3)
    with torch.no_grad():
        maps, log_det = model.flow.log_likelihood_maps(given)
    for ours, theirs in zip(onnx_runtime(path)(*given), (*maps, log_det), strict=True):
        torch.testing.assert_close(ours, theirs, **EXPORTED)


@pytest.fixture
def scalar(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(TorchCompile, "options", {**TorchCompile.options, "cpp.simdlen": 1})
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class ConvolutionPlusMap(nn.Module):
    """A map of the output's own shape, computed from weights alone, as the condition's is at batch 1."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, padding=1)
        self.map = nn.Parameter(torch.randn(1, 4, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.convolution(x) + self.map.exp())


@pytest.mark.usefixtures("scalar")
def test_a_frozen_map_is_the_same_in_every_call() -> None:
    torch.manual_seed(0)
    module, x = ConvolutionPlusMap().requires_grad_(False).eval(), torch.randn(1, 3, 5, 5)
    compiled = TorchCompile.compile(module.forward, frozen=True)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(x), module(x))


def test_who_does_not_train_says_so() -> None:
    class InferenceOnly(ONNXRuntime):
        def __init__(self) -> None: ...

    contestant: Contestant = InferenceOnly()
    with pytest.raises(NotImplementedError, match="ONNX Runtime does not train"):
        contestant.loss([])
