"""``predict --engine openvino`` writes the tables and the pictures that PyTorch does."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmsflow.inference import openvino_engine, openvino_graph
from tests.helpers.predictions import SCORES, Command, rows, setting, table_rows
from tests.helpers.tolerances import EXPORTED

pytest.importorskip("openvino", reason="needs OpenVINO: pip install 'fastmsflow[openvino]'")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def one_conversion() -> None:
    """Converts a model once for all tests."""
    done: dict[tuple[str, ...], openvino_graph.Parts] = {}

    def converted(model: object, outputs: tuple[str, ...]) -> openvino_graph.Parts:
        if outputs not in done:
            done[outputs] = openvino_graph.converted(model, outputs)
        return done[outputs]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvino_engine, "converted", converted)
        yield


@pytest.fixture
def both(checkpoint: Path, noise_images: Path, predict_parquet: Command, tmp_path: Path) -> Callable[..., list[Path]]:
    """Predicts by both engines -> the folders of results."""

    def run(form: str) -> list[Path]:
        for engine in ("torch", "openvino"):
            given = (checkpoint, noise_images, "--out", tmp_path / engine, "--engine", engine, "--batch-size", 7)
            assert predict_parquet(*given, "--workers", 0, form=form)[0] == 0
        return [tmp_path / engine for engine in ("torch", "openvino")]

    return run


def test_tables_and_heat_maps_are_those_of_pytorch(both: Callable[..., list[Path]]) -> None:
    torch_folder, openvino_folder = both("csv")
    expected, found = table_rows(torch_folder), table_rows(openvino_folder)
    assert {row["label"] for row in expected} == {"good", "defective"}
    others = [name for name in expected[0] if name not in (*SCORES, "largest_region")]
    assert [[row[name] for name in others] for row in found] == [[row[name] for name in others] for row in expected]
    for name in SCORES:
        values = [[float(row[name]) for row in table] for table in (found, expected)]
        np.testing.assert_allclose(*values, **EXPORTED, err_msg=name)
    areas = [[float(row["largest_region"]) for row in table] for table in (found, expected)]
    # A pixel whose value is at the threshold may fall to the other side.
    np.testing.assert_allclose(*areas, atol=1)
    for row in expected:
        pictures = [
            np.asarray(Image.open(folder / row["heat_map"]), np.int16) for folder in (torch_folder, openvino_folder)
        ]
        # A color of 8 bits may be rounded to its neighbor.
        assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_parquet_files_are_those_of_pytorch_and_are_gone_on_with_by_the_same_engine_alone(
    both: Callable[..., list[Path]], checkpoint: Path, noise_images: Path, predict_parquet: Command
) -> None:
    torch_folder, openvino_folder = both("parquet")
    for expected, found in zip(rows(torch_folder), rows(openvino_folder), strict=True):
        assert (found["path"], found["defective"]) == (expected["path"], expected["defective"])
        np.testing.assert_allclose([found[name] for name in SCORES], [expected[name] for name in SCORES], **EXPORTED)
    assert (setting(torch_folder)["engine"], setting(openvino_folder)["engine"]) == ("torch", "openvino")
    code, _, said = predict_parquet(checkpoint, noise_images, "--out", openvino_folder, "--workers", 0)
    assert (code, "holds results of another run (engine was openvino, is torch); set that back" in said) == (1, True)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--engine", "onnx"), "engine 'onnx' is not known; give torch or openvino"),
        (
            ("--engine", "openvino", "--dtype", "float16"),
            "dtype float16: with the engine openvino give float32, bfloat16 or auto, which is float32",
        ),
    ],
)
@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_what_an_engine_does_not_do_is_refused_in_one_line(
    form: str, options: tuple[str, ...], line: str, checkpoint: Path, noise_images: Path, predict_parquet: Command,
    tmp_path: Path,
) -> None:  # fmt: skip
    code, _, said = predict_parquet(checkpoint, noise_images, "--out", tmp_path / "out", *options, form=form)
    assert (code, said) == (1, f"fastmsflow: {line}")
    assert not (tmp_path / "out").exists()


def test_without_openvino_one_line_says_what_to_install(
    checkpoint: Path, noise_images: Path, predict: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_graph, "find_spec", lambda name: None)
    monkeypatch.setattr(openvino_engine, "converted", openvino_graph.converted)
    code, _, said = predict(checkpoint, noise_images, "--out", tmp_path / "out", "--engine", "openvino")
    assert (code, said) == (1, "fastmsflow: OpenVINO needs openvino: pip install 'fastmsflow[openvino]'")
    assert not (tmp_path / "out").exists()
