"""Tests what docs/deployment.md shows: the C++ sample, compiled by the page's own line, scores as the model does and
refuses in one line what it cannot score; the page's Python gives the model's scores; the table tells what is off."""

import ast
import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import deployment, interleaved, runtimes
from fastmsflow import MSFlow, Prediction
from fastmsflow.data import load_image
from tests.helpers.pages import EXAMPLES, blocks, missing, run_up_to
from tests.helpers.paths import ROOT
from tests.helpers.tolerances import EXPORTED

onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")

pytestmark = pytest.mark.slow

PAGE = ROOT / "docs/deployment.md"
PYTHON = [block for block in EXAMPLES if block.page == PAGE]
SIZE = (64, 96)
PIXELS = np.random.default_rng(0).integers(0, 256, (*SIZE, 4), np.uint8)


@pytest.fixture(scope="module")
def model() -> MSFlow:
    torch.manual_seed(0)
    return MSFlow("test_resnet.r160_in1k", pretrained=False, image_size=SIZE, blocks=(1, 1, 1)).eval()


@pytest.fixture(scope="module")
def folder(model: MSFlow, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the page names, and those that the sample refuses."""
    folder = tmp_path_factory.mktemp("deployment")
    for name in ("runs/mine", "new_images"):
        (folder / name).mkdir(parents=True)
    model.save(folder / "runs/mine/best.safetensors")
    Image.fromarray(PIXELS[..., :3]).save(folder / "new_images/0.png")
    Image.fromarray(PIXELS[:48, ..., :3]).save(folder / "small.png")
    Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    whole = (folder / "new_images/0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("no image, but text that is long enough for a signature")
    (folder / "text.onnx").write_text("no graph")
    return folder


@pytest.fixture(scope="module")
def exported(folder: Path) -> dict[str, Any]:
    """The variables of the page's Python after its first block, which writes model.onnx into ``folder``."""
    names: dict[str, Any] = {"run": []}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_up_to(PYTHON[0], names)
    return names


@pytest.fixture(scope="module")
def sample(folder: Path, exported: dict[str, Any]) -> Path:
    """The sample, compiled in ``folder`` by the page's line, with the headers that g++ finds and pip's library."""
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler: apt-get install g++")
    for header, remedy in (("png.h", "apt-get install libpng-dev"), ("onnxruntime_cxx_api.h", "see CONTRIBUTING.md")):
        command = ["g++", "-std=c++17", "-E", "-dM", "-x", "c++", "-include", header, os.devnull]
        macros = subprocess.run(command, capture_output=True, text=True, check=False)
        if macros.returncode != 0:
            pytest.skip(f"needs {header}: {remedy}")
    wanted = re.search(r"#define ORT_API_VERSION (\d+)", macros.stdout)
    if wanted and int(onnxruntime.__version__.split(".")[1]) < int(wanted[1]):
        pytest.skip(f"needs onnxruntime 1.{wanted[1]} or later, as its headers are")
    (library,) = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*")
    (folder / "onnxruntime/lib").mkdir(parents=True)
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / "onnxruntime/lib" / name).symlink_to(library)
    (folder / "examples").symlink_to(ROOT / "examples")
    (line,) = [block.text for block in blocks(PAGE) if block.text.startswith("g++ ")]
    subprocess.run(line, shell=True, cwd=folder, check=True)
    return folder / "score"


def run(sample: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sample, *arguments], cwd=sample.parent, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "LA"])
def test_the_cpp_sample_scores_a_png_as_the_model_does(mode: str, sample: Path, model: MSFlow, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(PIXELS if "A" in mode else PIXELS[..., :3]).convert(mode).save(path)
    done = run(sample, "model.onnx", str(path))
    assert (done.stderr, done.returncode) == ("", 0)
    scores = {name: float(value) for name, value in map(str.split, done.stdout.splitlines())}
    expected = model.predict(load_image(path, SIZE)[None])
    assert list(scores) == ["score", "log_score", "absolute_score"]
    for name, score in scores.items():
        assert score == pytest.approx(getattr(expected, name).item(), rel=EXPORTED["rtol"]), name


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "usage: score MODEL.onnx IMAGE.png"),
        (["model.onnx", "none.png"], "none.png: no readable PNG: No such file or directory"),
        (["model.onnx", "text.png"], "text.png: no readable PNG: Not a PNG file"),
        (["model.onnx", "cut.png"], "cut.png: no readable PNG: .+"),
        (["model.onnx", "small.png"], r"small.png: the image is 48x96; this model takes 64x96 \(height x width\): .+"),
        (["model.onnx", "deep.png"], "deep.png: the image has 16 bits a channel: convert it to 8"),
        (["none.onnx", "new_images/0.png"], ".*none.onnx.*File doesn't exist"),
        (["text.onnx", "new_images/0.png"], ".*text.onnx.*"),
    ],
    ids=lambda value: " ".join(value) or "no arguments" if isinstance(value, list) else "",
)
def test_the_cpp_sample_refuses_in_one_line(arguments: list[str], line: str, sample: Path) -> None:
    done = run(sample, *arguments)
    assert (done.stdout, done.returncode) == ("", 1)
    assert re.fullmatch(f"score: {line}\n", done.stderr), done.stderr


def test_the_cpp_sample_refuses_a_graph_of_another_kind(sample: Path) -> None:
    import onnx

    images, out = (onnx.helper.make_tensor_value_info(name, 1, [1, 2]) for name in ("images", "out"))
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["images"], ["out"])], "other", [images], [out])
    onnx.save(onnx.helper.make_model(graph, ir_version=8), sample.with_name("other.onnx"))
    done = run(sample, "other.onnx", "new_images/0.png")
    assert done.returncode == 1
    assert done.stderr == "score: other.onnx: no model that fastmsflow exported\n"


def test_the_pages_python_gives_the_models_scores(
    folder: Path, exported: dict[str, Any], model: MSFlow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    expected = model.predict(load_image("new_images/0.png", SIZE)[None])
    names, compared = exported, []
    for block in PYTHON:
        if missing(block):
            continue
        run_up_to(block, names)
        assigned = {node.id for node in ast.walk(ast.parse(block.text)) if isinstance(node, ast.Name)}
        if "absolute_score" in assigned:
            compared.append(str(block))
            for name in deployment.SCORES:
                given = torch.as_tensor(names[name])
                torch.testing.assert_close(given, getattr(expected, name), **EXPORTED, msg=f"{block}: {name}")
    assert len(compared) == 2 + bool(find_spec("openvino"))


def test_the_table_tells_what_is_off_and_what_was_not_measured(model: MSFlow, monkeypatch, tmp_path: Path) -> None:
    def off(images: torch.Tensor) -> list[torch.Tensor]:
        return [output + 0.5 for output in model.predict(images)]

    ways = [deployment.Contestant("`model.predict`", model.predict), deployment.Contestant("ONNX Runtime", off, PAGE)]
    monkeypatch.setattr(deployment, "contestants", lambda model, folder: ways)
    monkeypatch.setattr(interleaved, "PAUSE", 0)
    images = torch.rand(9, 3, *SIZE)
    order = model.predict(images).absolute_score.argsort().argsort()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in deployment.table(model, images, (order >= 4).int().tolist(), rounds=1).splitlines()
    ]
    assert [row[0] for row in rows] == ["", "---", "`model.predict`", "ONNX Runtime", "OpenVINO", "TensorRT"]
    assert rows[2][2:4] == ["0e+00", "1.0000"]
    assert rows[3][1:4] == ["0 MiB", rows[3][2], "1.0000"]
    assert 0.01 < float(rows[3][2]) <= 0.5
    assert all(float(cell) > 0 for cell in rows[3][4:])
    assert rows[4][1:] == rows[5][1:] == ["not measured"] * 5


@pytest.mark.usefixtures("exported")
def test_the_runtimes_that_are_timed_compute_what_the_model_does(folder: Path, model: MSFlow) -> None:
    images = torch.rand(2, 3, *SIZE)
    graphs = [runtimes.onnx_runtime(folder / "model.onnx")]
    if find_spec("openvino") is not None:
        graphs.append(runtimes.OpenVINO(folder / "model.onnx", "f32"))
    for graph in graphs:
        assert deployment.difference(Prediction(*graph(images)), model.predict(images)) <= EXPORTED["rtol"]
