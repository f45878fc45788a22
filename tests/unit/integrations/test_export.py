"""Exported graphs compute what the model predicts, for any batch; and what PyTorch's own tools make of a model."""

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._inductor import cpu_vec_isa
from torch.export import ExportedProgram

from fastmsflow import MSFlow, Prediction, UnavailableError
from fastmsflow.integrations import export
from tests.helpers.paths import ROOT
from tests.helpers.tolerances import EXPORTED

pytestmark = pytest.mark.slow

SIZE = (72, 104)  # grids of 9x13, 5x7 and 3x4: none divides another


def new_model(**options) -> MSFlow:
    torch.manual_seed(0)
    model = MSFlow("test_resnet.r160_in1k", pretrained=False, image_size=SIZE, blocks=(1, 2, 1), **options).eval()
    with torch.no_grad():
        for parameter in model.flow.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def model() -> MSFlow:
    return new_model(standardise=True)


@pytest.fixture(scope="module")
def tiny() -> MSFlow:
    """Makes a model that a C++ compiler takes seconds for, not minutes."""
    torch.manual_seed(0)
    options = {"image_size": SIZE, "blocks": (1, 1, 1), "standardise": True}
    return MSFlow("test_resnet.r160_in1k", pretrained=False, **options).eval()


@pytest.fixture(scope="module")
def traced(model: MSFlow) -> ExportedProgram:
    """The program of ``model``, whose tracing takes a second."""
    return export._Predictor(model).program()


@pytest.fixture
def traced_already(traced: ExportedProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has exports of ``model`` use that program."""
    monkeypatch.setattr(export._Predictor, "program", lambda predictor: traced)


def images(batch: int) -> Tensor:
    return torch.rand(batch, 3, *SIZE, generator=torch.Generator().manual_seed(batch))


def assert_predicts(graph: Callable[[Tensor], Sequence[Tensor]], model: MSFlow) -> None:
    """Every output, at batches that were neither traced nor compared when it was written."""
    for batch in (1, 4):
        expected = model.predict(images(batch))
        for name, given, ours in zip(Prediction._fields, graph(images(batch)), expected, strict=True):
            torch.testing.assert_close(given, ours, **EXPORTED, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.usefixtures("traced_already")
def test_an_onnx_file_predicts_as_the_model_in_onnx_runtime(model: MSFlow, tmp_path: Path) -> None:
    import onnxruntime

    done = export.export_onnx(model, tmp_path / "model.onnx")
    assert done.difference <= 1e-4
    session = onnxruntime.InferenceSession(done.path)
    assert [output.name for output in session.get_outputs()] == list(Prediction._fields)
    assert session.get_inputs()[0].shape == ["batch", 3, *SIZE]
    assert_predicts(lambda x: [torch.from_numpy(a) for a in session.run(None, {"images": x.numpy()})], model)


@pytest.mark.usefixtures("traced_already")
def test_a_program_predicts_as_the_model_without_this_library(model: MSFlow, tmp_path: Path) -> None:
    done = export.export_program(model, tmp_path / "model.pt2")
    assert_predicts(torch.export.load(done.path).module(), model)
    torch.save(images(2), tmp_path / "images.pt")
    code = (
        "import sys; sys.modules['fastmsflow'] = None; import torch;"
        f"graph = torch.export.load({str(done.path)!r}).module(); images = torch.load({str(tmp_path / 'images.pt')!r});"
        "print(graph(images)[1].tolist())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert eval(printed) == pytest.approx(model.predict(images(2)).log_score.tolist(), rel=1e-5)


@pytest.fixture
def vector_instructions() -> Iterator[None]:
    """Compiles as for users, whose packages have this chip's vector instructions; the other tests do without."""
    # Headers compiled beforehand serve many packages, and cost more than they save for one.
    with torch._inductor.config.patch({"cpp.vec_isa_ok": None, "aot_inductor.precompile_headers": False}):
        cpu_vec_isa.valid_vec_isa_list.cache_clear()
        yield
    cpu_vec_isa.valid_vec_isa_list.cache_clear()


def test_a_compiled_package_predicts_as_the_model(tiny: MSFlow, tmp_path: Path, vector_instructions: None) -> None:
    done = export.export_package(tiny, tmp_path / "model.pt2")
    assert_predicts(torch._inductor.aoti_load_package(str(done.path)), tiny)


def test_what_comes_of_weights_alone_is_a_constant_of_the_graph(model: MSFlow, traced: ExportedProgram) -> None:
    with torch.no_grad():
        plain = torch.export.export(export._Predictor(model), (images(2),))
    convolutions = [sum("conv2d" in str(n.target) for n in graph.graph.nodes) for graph in (traced, plain)]
    assert convolutions[1] - convolutions[0] == sum(model.flow.blocks)


def test_export_follows_a_change_of_weights_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = new_model().train()
    export._Predictor(model).program()
    with torch.no_grad():
        for parameter in model.flow.parameters():
            parameter.mul_(1.1)
    before = copy.deepcopy(model.state_dict())
    done = export.export_program(model, tmp_path / "model.pt2")
    assert model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert_predicts(torch.export.load(done.path).module(), model.eval())


@pytest.mark.usefixtures("traced_already")
def test_a_graph_that_computes_something_else_is_not_handed_over(model: MSFlow, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "model.onnx").write_text("an earlier file")
    written = SimpleNamespace(save=Path.touch, model=SimpleNamespace(metadata_props={}))
    monkeypatch.setattr(torch.onnx, "export", lambda program, **options: written)
    monkeypatch.setattr(export, "_onnx_graph", lambda path: lambda x: [value + 1 for value in model.predict(x)])
    with pytest.raises(UnavailableError, match=r"scores differ from the model's by 1, more than 0\.0001; nothing"):
        export.export_onnx(model, tmp_path / "model.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "an earlier file"


def test_onnx_without_its_packages_says_what_to_install(model: MSFlow, tmp_path: Path, monkeypatch) -> None:
    find = export.importlib.util.find_spec
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    with pytest.raises(UnavailableError, match=r"ONNX needs onnxruntime: pip install 'fastmsflow\[onnx\]'"):
        export.export_onnx(model, tmp_path / "model.onnx")


def test_a_package_for_a_gpu_has_the_kernels_inside_at_any_batch() -> None:
    # In a process of its own, where Triton compiles: in the interpreter there is nothing to record.
    script = ROOT / "tests/helpers/kernels_inside.py"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(script)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    operators, launches, batch = eval(run.stdout)
    assert operators == []
    assert launches > 0
    assert not batch.isdigit()


def test_a_whole_model_compiles_to_one_graph(model: MSFlow) -> None:
    # By Inductor it takes most of a minute; the package above goes through it.
    predict = torch.compile(model.predict, fullgraph=True, backend="aot_eager")
    for given, expected in zip(predict(images(2)), model.predict(images(2)), strict=True):
        torch.testing.assert_close(given, expected, **EXPORTED)


def test_a_whole_model_trains_compiled() -> None:
    model = new_model().train()
    expected = torch.autograd.grad(model.nll(images(2)).mean(), list(model.flow.parameters()))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    z, log_det = compiled(images(2))
    nll = sum(0.5 * level.square().sum(dim=(1, 2, 3)) for level in z) - log_det
    for given, ours in zip(torch.autograd.grad(nll.mean(), list(model.flow.parameters())), expected, strict=True):
        torch.testing.assert_close(given, ours, rtol=1e-4, atol=1e-4 * ours.abs().max().item())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("prepared", [lambda m: m, MSFlow.for_inference], ids=["as it is", "for inference"])
def test_a_copied_model_that_has_predicted_predicts_the_same(copied, prepared, model: MSFlow) -> None:
    original = prepared(model)
    expected = original.predict(images(2))
    for given, ours in zip(copied(original).predict(images(2)), expected, strict=True):
        assert torch.equal(given, ours)
