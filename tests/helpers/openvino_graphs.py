"""A model that bears INT8 in part, and good images for it."""

from pathlib import Path

import torch
from PIL import Image
from skimage import data as photographs

from fastmsflow import MSFlow
from tests.helpers.tiny_model import tiny_model

SIZE = (40, 56)


def noisy_model() -> MSFlow:
    """A model whose flow has noise on its weights: without, INT8 moves nothing."""
    model = tiny_model(image_size=SIZE, standardise=True).eval()
    with torch.no_grad():
        for parameter in model.flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def write_bricks(folder: Path, count: int) -> list[Path]:
    """Writes overlapping tiles of a photograph: 00.png and so on."""
    files = [folder / f"{i:02}.png" for i in range(count)]
    for i, file in enumerate(files):
        Image.fromarray(photographs.brick()[i * 9 : i * 9 + 80, i % 4 * 100 : i % 4 * 100 + 80]).save(file)
    return files
