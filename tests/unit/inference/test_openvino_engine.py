"""OpenVINO scores as PyTorch does, is refused for what it cannot do, and leaves nothing behind."""

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastmsflow import InputError, MSFlow, UnavailableError
from fastmsflow.inference import BatchScorer, openvino_engine, openvino_graph
from fastmsflow.inference.openvino_engine import OpenVinoModel
from fastmsflow.inference.openvino_graph import Parts, converted
from fastmsflow.scoring import Scores
from tests.helpers.paths import ROOT
from tests.helpers.tiny_model import tiny_model
from tests.helpers.tolerances import EXPORTED, OPENVINO_BFLOAT16

openvino = pytest.importorskip("openvino", reason="needs OpenVINO: pip install 'fastmsflow[openvino]'")

SIZE = (40, 56)  # grids of 10x14, 5x7 and 3x4: none divides another


def images(model: MSFlow, batch: int) -> torch.Tensor:
    return torch.rand(batch, 3, *model.image_size, generator=torch.Generator().manual_seed(batch))


def assert_scores_as(model: MSFlow, engine: OpenVinoModel, tolerance: dict[str, float]) -> None:
    for batch in (4, 1):
        given, expected = engine.scores(images(model, batch)), model.scores(images(model, batch))
        for name in (*Scores._fields, "absolute_score", "absolute_map", "score_map_add", "score_map_mul"):
            torch.testing.assert_close(
                getattr(given, name),
                getattr(expected, name),
                **tolerance,
                msg=lambda text, name=name: f"{name}: {text}",
            )


@pytest.fixture(scope="module")
def model() -> MSFlow:
    return tiny_model(image_size=SIZE, pool="max", standardise=True).eval()


@pytest.fixture(scope="module")
def parts(model: MSFlow) -> Parts:
    return converted(model.for_inference(), Scores._fields)


@pytest.fixture
def engine(
    request: pytest.FixtureRequest, model: MSFlow, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> OpenVinoModel:
    """``model`` in the dtype that is asked for, without the seconds of another conversion."""
    if request.param == "bfloat16" and "BF16" not in openvino_engine._capabilities():
        pytest.skip("bfloat16 needs a chip that has it")
    monkeypatch.setattr(openvino_engine, "converted", lambda model, outputs: parts)
    return OpenVinoModel(model, request.param)


def precisions(engine: OpenVinoModel) -> list[Any]:
    return [part.get_property("INFERENCE_PRECISION_HINT") for part in (engine._extractor, engine._flow)]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("engine", ["auto"], indirect=True)
def test_scores_are_those_of_pytorch_at_any_batch(engine: OpenVinoModel, model: MSFlow) -> None:
    assert engine.dtype == "float32"
    assert precisions(engine) == [openvino.Type.f32] * 2
    assert engine._flow.get_property("INFERENCE_NUM_THREADS") == torch.get_num_threads()
    assert_scores_as(model, engine, EXPORTED)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("engine", ["bfloat16"], indirect=True)
def test_in_bfloat16_the_flow_alone_is_rounded(engine: OpenVinoModel, model: MSFlow) -> None:
    assert engine.dtype == "bfloat16"
    assert precisions(engine) == [openvino.Type.f32, openvino.Type.bf16]
    assert_scores_as(model, engine, OPENVINO_BFLOAT16)
    one = images(model, 1)
    features = [torch.from_numpy(level) for level in engine._extractor(one.numpy()).to_tuple()]
    for level, expected in zip(features, model.features(one), strict=True):
        torch.testing.assert_close(level, expected, **EXPORTED)
    difference = (engine.scores(one).log_score / model.scores(one).log_score - 1).abs().item()
    assert difference > 1e-5


def test_bfloat16_is_refused_where_the_chip_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_engine, "_capabilities", lambda: ["FP32", "INT8"])
    with pytest.raises(UnavailableError, match=r"^dtype bfloat16: this chip has no instructions for it; give float32$"):
        OpenVinoModel(tiny_model(), "bfloat16")


def test_a_model_that_was_made_for_half_precision_is_refused() -> None:
    with pytest.raises(InputError, match=r"^the model is in torch\.float16; give the one that it was made from$"):
        OpenVinoModel(tiny_model().for_inference(torch.float16))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"dtype": "float16"},
            "dtype float16: with the engine openvino give float32, bfloat16 or auto, which is float32",
        ),
        ({"device": "cuda"}, "device cuda: the engine openvino computes on the CPU; give auto or cpu"),
    ],
)
def test_what_openvino_does_not_do_is_refused_in_one_line(options: dict[str, str], line: str) -> None:
    with pytest.raises(InputError) as caught:
        BatchScorer(tiny_model(), engine="openvino", **options)
    assert str(caught.value) == line


def test_without_openvino_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_graph, "find_spec", lambda name: None)
    scorer = BatchScorer(tiny_model(), engine="openvino")
    with pytest.raises(UnavailableError, match=r"^OpenVINO needs openvino: pip install 'fastmsflow\[openvino\]'$"):
        scorer({"image": np.zeros((1, 32, 32, 3), np.uint8)})


def test_no_telemetry_is_sent_and_nothing_is_left_in_the_home_folder(python: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from fastmsflow.inference.openvino_graph import import_openvino; import_openvino().Core();"
        "from openvino.tools.ovc import telemetry_utils;"
        "print(telemetry_utils.tm.__name__, [name for name in sys.modules if name.startswith('openvino_telemetry')])"
    )
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert (done.stdout.strip(), done.returncode) == ("openvino.tools.ovc.telemetry_stub []", 0), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_no_telemetry_is_sent_where_openvino_was_imported_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("OpenVINO sends")

    telemetry = pytest.importorskip("openvino_telemetry")
    monkeypatch.setattr(telemetry, "Telemetry", refused)
    converted(tiny_model().for_inference(), ["score"])
    assert telemetry.Telemetry is refused


def test_signals_are_handled_after_a_model_went_away_in_another_thread(python: Path) -> None:
    code = (
        "import os, signal, threading, torch\n"
        "from fastmsflow.inference.openvino_engine import OpenVinoModel\n"
        "from tests.helpers.tiny_model import tiny_model\n"
        "models = [OpenVinoModel(tiny_model())]\n"
        "thread = threading.Thread(target=models.clear)\n"
        "thread.start(), thread.join()\n"
        "signal.signal(signal.SIGUSR1, lambda *_: print('handled'))\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.stdout, done.returncode) == ("handled\n", 0), done.stderr
