"""The files that the documentation's pages name: small ones, of the kinds and names."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastmsflow import MSFlow, MultiScaleFlow
from fastmsflow.calibration import Calibration, PixelThresholds
from fastmsflow.compat import save_official
from fastmsflow.compat.convert import OfficialSettings, official_to_own

CHANNELS = (256, 512, 1024)


def pages_folder(folder: Path) -> Path:
    """Writes the files into ``folder``."""
    torch.manual_seed(0)
    (folder / "runs/mine").mkdir(parents=True)
    small = MSFlow("test_resnet.r160_in1k", pretrained=False, image_size=(64, 64), blocks=(1, 1, 1))
    pixels = PixelThresholds(rates=(0.001,), values=(1.0,), low=(0.0,), high=(1.0,))
    small.calibration = Calibration(tuple(range(19)), tuple(range(19)), 1.0, pixels=pixels)
    small.save(folder / "runs/mine/best.safetensors", epoch=1)
    save_official(MultiScaleFlow(CHANNELS, blocks=(1, 1, 1)), folder / "official.pt")
    official_to_own(folder / "official.pt", folder / "own.safetensors", OfficialSettings())
    random = np.random.default_rng(0)
    for name in ("good_images", "new_images"):
        (folder / name).mkdir()
        for i in range(4):
            Image.fromarray(random.integers(0, 256, (48, 64, 3), np.uint8)).save(folder / name / f"{i}.png")
    return folder
