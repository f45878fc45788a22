"""OpenVINO graphs of small models: as they are, or such that INT8 does less well."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from skimage import data as photographs

from fastmsflow import MSFlow, Prediction
from fastmsflow.inference.openvino_graph import converted, joined
from tests.helpers.tiny_model import tiny_model

SIZE = (40, 56)
NOISE = {"network": 0.0, "flow": 0.05, None: 0.2}
"""The noise on the flow's weights that leaves INT8 to the network, to the flow alone, or to nothing."""


def noisy_model(noise: float) -> MSFlow:
    model = tiny_model(image_size=SIZE, standardise=True).eval()
    with torch.no_grad():
        for parameter in model.flow.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model


def graph(model: MSFlow) -> Any:
    """The graph that INT8 begins with."""
    return joined(converted(model.for_inference(), (*Prediction._fields, "absolute_map")))


def write_bricks(folder: Path, count: int) -> list[Path]:
    """Writes overlapping tiles of a photograph: 00.png and so on."""
    files = [folder / f"{i:02}.png" for i in range(count)]
    for i, file in enumerate(files):
        Image.fromarray(photographs.brick()[i * 9 : i * 9 + 80, i % 4 * 100 : i % 4 * 100 + 80]).save(file)
    return files
