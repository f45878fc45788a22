"""OpenVINO scores as PyTorch does, is refused for what it cannot do, and leaves nothing behind."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmsflow import InputError, MSFlow, UnavailableError
from fastmsflow.inference import BatchScorer, openvino_engine, openvino_graph
from fastmsflow.inference.openvino_engine import OpenVinoModel
from fastmsflow.scoring import Scores
from tests.helpers.tiny_model import tiny_model
from tests.helpers.tolerances import EXPORTED, OPENVINO_BFLOAT16

openvino = pytest.importorskip("openvino", reason="needs OpenVINO: pip install 'fastmsflow[openvino]'")

# Grids of which none divides another; the extractors and pools differ.
MODELS = {
    "resnet, max": {"image_size": (40, 56), "pool": "max", "standardise": True, "blocks": (1, 2, 1)},
    "efficientnet, none": {"image_size": (72, 40), "pool": "none", "extractor": "test_efficientnet"},
}


def new_model(name: str) -> MSFlow:
    options = dict(MODELS[name])
    extractor = options.pop("extractor", "test_resnet.r160_in1k")
    torch.manual_seed(0)
    return MSFlow(extractor, pretrained=False, **{"blocks": (1, 1, 1), **options}).eval()


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


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_pytorch_at_any_batch(name: str) -> None:
    model = new_model(name)
    engine = OpenVinoModel(model)
    assert engine.dtype == "float32"
    assert_scores_as(model, engine, EXPORTED)
    # A computed float value in another precision would show here.
    for part in (engine._extractor, engine._flow):
        assert part.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32
        assert part.get_property("INFERENCE_NUM_THREADS") == torch.get_num_threads()
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("bfloat16 needs a chip that has it")
    rounded = OpenVinoModel(model, "bfloat16")
    assert rounded.dtype == "bfloat16"
    assert rounded._extractor.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32
    assert rounded._flow.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.bf16
    assert_scores_as(model, rounded, OPENVINO_BFLOAT16)
    assert not torch.equal(rounded.scores(images(model, 1)).log_score, engine.scores(images(model, 1)).log_score)


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
        "import sys; from fastmsflow.inference.openvino_graph import import_openvino, without_telemetry;"
        "ov = import_openvino('nncf'); ov.Core(); from openvino.tools.ovc import convert_impl, telemetry_utils;"
        "print(telemetry_utils.tm.__name__, sorted(n for n in sys.modules if n.startswith('openvino_telemetry')))"
    )
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert (done.stdout.strip(), done.returncode) == ("openvino.tools.ovc.telemetry_stub []", 0), done.stderr
    assert list(tmp_path.iterdir()) == []
