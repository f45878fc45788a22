"""Exported graphs of models that take tiles."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from fastmsflow import InputError, MSFlow
from fastmsflow.inference import TiledPredictor
from fastmsflow.integrations.export import CONFIG, export_onnx, export_openvino, export_program
from fastmsflow.models.msflow import Prediction
from fastmsflow.tiling import Position, Tiling, cut_tile
from tests.helpers.tiny_model import tiny_model
from tests.helpers.tolerances import EXPORTED_MAPS

SIZE = (50, 83)
Graph = Callable[..., Sequence[Tensor]]


def tiled(position: Position) -> MSFlow:
    model = tiny_model().eval()
    model.tiling = Tiling(32, position=position)
    return model


def blended(graph: Graph, tiling: Tiling, image: Tensor) -> Tensor:
    """Cuts ``image`` as a user of the graph does, and blends the absolute maps of its tiles."""
    total = torch.zeros(image.shape[1:])
    rows, columns = (tiling.weights(length) for length in SIZE)
    for top, down in rows:
        for left, across in columns:
            tile = cut_tile(image, (top, left), tiling.tile)[None]
            offsets = torch.tensor([[top, left]]) / tiling.tile
            absolute = graph(tile, offsets)[-1][0] if tiling.position == "image" else graph(tile)[-1][0]
            total[top : top + tiling.tile, left : left + tiling.tile] += absolute * down[:, None] * across
    return total


def onnx_graph(path: Path) -> Graph:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        given = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, given)]

    return run


def assert_blends(graph: Graph, model: MSFlow) -> None:
    """Asserts that the graph's maps blend to the predictor's map."""
    assert model.tiling is not None
    image = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(3))
    (scores,) = TiledPredictor(model, 32).scores([image])
    difference = (blended(graph, model.tiling, image) - scores.absolute_map[0]).abs().max().item()
    assert difference <= EXPORTED_MAPS * scores.absolute_map.max().item()


def test_maps_of_a_graph_that_is_given_places_blend_to_the_predictors_map(tmp_path: Path) -> None:
    model = tiled("image")
    path = export_onnx(model, tmp_path / "model.onnx").path
    assert_blends(onnx_graph(path), model)
    session = onnx.load(path)
    assert [port.name for port in session.graph.input] == ["images", "offsets"]
    assert [port.name for port in session.graph.output] == [*Prediction._fields, "absolute_map"]
    (stated,) = (entry.value for entry in session.metadata_props if entry.key == "fastmsflow")
    assert json.loads(stated)["tiling"]["position"] == "image"


def test_maps_of_a_program_blend_to_the_predictors_map(tmp_path: Path) -> None:
    model = tiled("tile")
    assert model.tiling is not None
    stated = {CONFIG: ""}
    program = torch.export.load(export_program(model, tmp_path / "model.pt2").path, extra_files=stated)
    assert_blends(program.module(), model)
    assert json.loads(stated[CONFIG])["tiling"] == model.tiling.config


def test_openvino_is_refused_where_it_would_lack_the_places_of_tiles(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"lack the places of tiles .* export it to \.onnx"):
        export_openvino(tiled("image"), tmp_path / "model.xml")
    assert not list(tmp_path.iterdir())
