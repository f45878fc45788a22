"""OpenVINO's files compute what the model predicts, in the precision that they name; INT8 is told of."""

import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmsflow import InputError, MSFlow, Prediction, UnavailableError
from fastmsflow.inference import openvino_int8
from fastmsflow.inference.openvino_graph import cpu_core
from fastmsflow.inference.openvino_int8 import faults, quantize
from fastmsflow.integrations import export
from tests.helpers.disks import small_disk
from tests.helpers.openvino_graphs import SIZE, noisy_model, write_bricks
from tests.helpers.tolerances import EXPORTED

openvino = pytest.importorskip("openvino", reason="needs OpenVINO: pip install 'fastmsflow[openvino]'")

pytestmark = pytest.mark.slow
NEEDS_NNCF = pytest.mark.skipif(find_spec("nncf") is None, reason="needs NNCF: pip install 'fastmsflow[openvino]'")


@pytest.fixture(scope="module")
def model() -> MSFlow:
    return noisy_model()


@pytest.fixture(scope="module")
def graphs() -> list[Any]:
    """The graph that is made for ``path``, before one of its outputs is taken away."""
    return []


@pytest.fixture(scope="module")
def path(model: MSFlow, graphs: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ir") / "model.xml"
    with pytest.MonkeyPatch.context() as patch:
        join = export.joined
        patch.setattr(export, "joined", lambda parts: graphs.append(join(parts)) or graphs[0].clone())
        done = export.export_openvino(model, path)
    assert done.difference <= 1e-4
    assert done.files == (path, path.with_suffix(".bin"))
    assert sorted(path.parent.iterdir()) == sorted(done.files)
    return path


@pytest.fixture
def converted_already(path: Path, graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares a test the seconds of another conversion of ``model``."""
    monkeypatch.setattr(export, "converted", lambda model, outputs: None)
    monkeypatch.setattr(export, "joined", lambda parts: graphs[0].clone())


def images(batch: int) -> torch.Tensor:
    return torch.rand(batch, 3, *SIZE, generator=torch.Generator().manual_seed(batch))


def float_types(compiled: Any) -> set[str]:
    """The types of floating-point numbers in which a compiled model computes."""
    infos = [operation.get_rt_info() for operation in compiled.get_runtime_model().get_ops()]
    return {info["runtimePrecision"].astype(str) for info in infos if "runtimePrecision" in info} & {
        "f32",
        "bf16",
        "f16",
    }


def test_a_file_predicts_as_the_model_by_its_names(model: MSFlow, path: Path) -> None:
    read = cpu_core().read_model(path)
    assert [port.get_any_name() for port in read.outputs] == list(Prediction._fields)
    assert [(port.get_any_name(), str(port.get_partial_shape())) for port in read.inputs] == [
        ("images", f"[?,3,{SIZE[0]},{SIZE[1]}]")
    ]
    compiled = cpu_core().compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch in (1, 4):
        outputs, expected = compiled(images(batch).numpy()), model.predict(images(batch))
        for name in Prediction._fields:
            torch.testing.assert_close(torch.from_numpy(outputs[name]), getattr(expected, name), **EXPORTED)


def test_the_precision_that_the_file_names_is_obeyed_where_it_is_handed_on(path: Path) -> None:
    read = cpu_core().read_model(path)
    named = read.get_rt_info(["runtime_options", "INFERENCE_PRECISION_HINT"]).astype(str)
    assert named == "f32"
    assert float_types(cpu_core().compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": named})) == {"f32"}
    if "BF16" in cpu_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        asked = cpu_core().compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
        assert "bf16" in float_types(asked)


def test_the_file_tells_the_models_configuration_and_calibration(model: MSFlow, path: Path) -> None:
    config = cpu_core().read_model(path).get_rt_info(["fastmsflow", "config"]).astype(str)
    assert json.loads(config) == json.loads(json.dumps(model.config))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_bricks(tmp_path_factory.mktemp("good"), 44)


@pytest.fixture
def before(path: Path, graphs: list[Any]) -> Any:
    """The graph of ``model``: INT8 keeps its scores if the flow alone is quantized, and not all of them else."""
    return graphs[0].clone()


def named_types(model: Any) -> set[tuple[str, str]]:
    """The part and the type of each operation whose values are rounded to INT8."""
    found = set()
    for operation in model.get_ops():
        if operation.get_type_name() == "FakeQuantize":
            for port in operation.output(0).get_target_inputs():
                node = port.get_node()
                found.add((node.get_friendly_name().partition("/")[0], node.get_type_name()))
    return found


@NEEDS_NNCF
def test_convolutions_are_quantized_as_far_as_scores_are_kept(
    model: MSFlow, before: Any, good: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after, report = quantize(before, good, model, tmp_path / "scratch.xml")
    assert (report.scope, report.calibration_images, report.held_out_images) == ("flow", 22, 22)
    assert not faults(report.figures)
    assert 0 < report.difference < 0.1
    assert 0 < report.quantized < report.convolutions
    assert named_types(after) == {("flow", "Convolution")}
    _, same = quantize(before, good, model, tmp_path / "again.xml")
    assert same == report
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "scratch.bin").read_bytes()
    # These limits allow that two labels of 22 change, which the whole network does.
    monkeypatch.setattr(openvino_int8, "LIMITS", replace(openvino_int8.LIMITS, same_label=0.9))
    after, report = quantize(before, good, model, tmp_path / "whole.xml")
    assert (report.scope, report.quantized) == ("network", report.convolutions)
    assert {part for part, _ in named_types(after)} == {"extractor", "flow"}
    assert {kind for _, kind in named_types(after)} <= {"Convolution", "GroupConvolution"}


@NEEDS_NNCF
def test_int8_that_changes_labels_is_refused_in_one_line(
    model: MSFlow, before: Any, good: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.setattr(openvino_int8, "NOT_QUANTIZED", {"network": ()})
    with pytest.raises(UnavailableError) as caught:
        quantize(before, good, model, tmp_path / "scratch.xml")
    assert str(caught.value) == (
        "INT8 does not keep the scores of 22 held-out good images, even if the flow alone is quantized (share of images"
        " with the same label 0.909, at least 0.95); nothing was written: give more images, or export without --int8"
    )
    assert tuple(capfd.readouterr()) == ("", "")


@NEEDS_NNCF
@pytest.mark.usefixtures("converted_already")
def test_int8_is_written_with_a_report(model: MSFlow, command, tmp_path: Path) -> None:
    model.save(tmp_path / "model.safetensors")
    (tmp_path / "good").mkdir()
    write_bricks(tmp_path / "good", 44)
    given = ("export", tmp_path / "model.safetensors", tmp_path / "model.xml", "--int8", tmp_path / "good")
    code, said = command(*given, "--json")
    assert code == 0
    told = json.loads(said)
    assert told["bytes"] == sum((tmp_path / name).stat().st_size for name in ("model.xml", "model.bin"))
    int8 = told["int8"]
    assert (int8["scope"], int8["calibration_images"], int8["held_out_images"]) == ("flow", 22, 22)
    assert 0 < int8["quantized"] < int8["convolutions"]
    assert told["difference"] == int8["difference"]
    assert int8["figures"]["rank_correlation"] >= 0.95
    read = cpu_core().read_model(tmp_path / "model.xml")
    assert sum(operation.get_type_name() == "FakeQuantize" for operation in read.get_ops()) >= int8["quantized"]
    assert [port.get_any_name() for port in read.outputs] == list(Prediction._fields)
    assert read.get_rt_info(["runtime_options", "INFERENCE_PRECISION_HINT"]).astype(str) == "f32"


@pytest.mark.usefixtures("converted_already")
def test_a_graph_that_computes_something_else_is_not_handed_over(
    model: MSFlow, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    monkeypatch.setattr(export, "_openvino_graph", lambda graph: lambda x: [value + 1 for value in model.predict(x)])
    with pytest.raises(UnavailableError, match=r"scores differ from the model's by 1, more than 0\.0001; nothing"):
        export.export_openvino(model, path)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


@pytest.mark.usefixtures("converted_already")
@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
@pytest.mark.parametrize("left", [-20, 20], ids=["the weights do not fit", "the graph does not fit"])
def test_a_full_disk_costs_one_line_and_leaves_nothing(left: int, model: MSFlow, path: Path, tmp_path: Path) -> None:
    size = path.with_suffix(".bin").stat().st_size // 1024 + left
    with small_disk(tmp_path / "disk", f"{size}k") as disk:
        with pytest.raises(InputError, match=r"o\.xml: cannot be written, the disk is full; free some space") as caught:
            export.export_openvino(model, disk / "o.xml")
        assert len(str(caught.value).splitlines()) == 1
        assert list(disk.iterdir()) == []


@pytest.mark.parametrize(
    ("to", "options", "line"),
    [
        ("model.txt", (), "give a name that ends in .onnx, .xml or .pt2; a compiled package is a .pt2"),
        ("model.xml", ("--compiled",), "give a name that ends in .onnx, .xml or .pt2; a compiled package is a .pt2"),
        ("model.onnx", ("--int8", "good"), "--int8 is for OpenVINO; give a name that ends in .xml, or leave it out"),
    ],
)
def test_what_does_not_go_together_is_refused(to: str, options: tuple[str, ...], line: str, command) -> None:
    code, said = command("export", "model.safetensors", to, *options)
    assert (code, said) == (1, f"fastmsflow: {to}: {line}")


@pytest.mark.parametrize("missing", ["openvino", "nncf"])
def test_without_a_package_one_line_says_what_to_install(
    missing: str, model: MSFlow, tmp_path: Path, monkeypatch
) -> None:
    from fastmsflow.inference import openvino_graph

    find = openvino_graph.find_spec
    monkeypatch.setattr(openvino_graph, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(UnavailableError, match=rf"^OpenVINO needs {missing}: pip install 'fastmsflow\[openvino\]'$"):
        export.export_openvino(model, tmp_path / "m.xml", [Path("good.png")])
    assert list(tmp_path.iterdir()) == []


@NEEDS_NNCF
@pytest.mark.parametrize(
    ("missing", "line"),
    [
        (True, "no_folder: no such file; give good images, folders or patterns"),
        (False, "INT8 needs 40 good images, half of them to be compared, and there are 1: give more, or export"),
    ],
)
def test_good_images_that_do_not_do_are_refused_before_the_conversion(
    missing: bool, line: str, model: MSFlow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "converted", lambda model, outputs: pytest.fail("was converted"))
    files = [tmp_path / "no_folder"] if missing else write_bricks(tmp_path, 1)
    with pytest.raises(InputError) as caught:
        export.export_openvino(model, tmp_path / "m.xml", files)
    assert line in str(caught.value)
    assert not (tmp_path / "m.xml").exists()
