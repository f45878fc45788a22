"""The course of a training as a picture."""

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from PIL import Image

from fastmsflow.visualization.plots import TRAINING, plot_training


def colours_inside_the_axes(path: Path) -> set[tuple[int, ...]]:
    """Without the legend, which has the same."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    height, width, _ = pixels.shape
    return set(map(tuple, pixels[: height * 3 // 4, width // 8 : width * 7 // 8].reshape(-1, 3).tolist()))


def test_a_run_of_one_pass_shows_each_of_its_points(tmp_path: Path) -> None:
    plot_training(tmp_path / "training.png", [512.3], [(1, 520.0)], {"image AUROC": [(1, 0.7)], "AUPRO": [(1, 0.4)]})
    first, second = (tuple(round(255 * part) for part in colormaps["tab10"](i)[:3]) for i in range(2))
    assert {first, second} <= colours_inside_the_axes(tmp_path / "training.png")
    plot_training(tmp_path / "training.png", [512.3], [], {})
    assert tuple(bytes.fromhex(TRAINING[1:])) in colours_inside_the_axes(tmp_path / "training.png")
