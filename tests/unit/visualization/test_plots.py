"""Plots of a training, of scores and of examples show all that they are to show, and nothing over another."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from fastmsflow.visualization import plots
from fastmsflow.visualization.color_scale import ColorScale
from fastmsflow.visualization.html_report import ReportRow
from fastmsflow.visualization.plots import TRAINING, gallery, plot_scores, plot_training


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


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    saved: list[Figure] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path, dpi=100: (figure.set_dpi(dpi), saved.append(figure)))
    return saved


@pytest.mark.parametrize(
    ("low", "high"), [(100, 101), (100, 112), (3, 14), (3, 25), (1, 99), (10, 800), (1, 3000), (1e-6, 1e6)]
)
def test_labels_of_scores_stand_apart_and_within_the_picture(low: float, high: float, figures: list[Figure]) -> None:
    plot_scores(Path("scores.png"), np.array([0, 1] * 20), np.geomspace(low, high, 40), "a title")
    (figure,) = figures
    drawn = FigureCanvasAgg(figure).get_renderer()
    (axis,) = figure.axes
    left, right = axis.get_xlim()
    labels = [
        label.get_window_extent(drawn)
        for tick, label in zip(axis.get_xticks(), axis.get_xticklabels(), strict=True)
        if left <= tick <= right
    ]
    assert len(labels) >= 2
    # No half of the axis is without one.
    middle = axis.get_window_extent(drawn).x0 + axis.get_window_extent(drawn).width / 2
    assert labels[0].x0 < middle < labels[-1].x1
    assert all(one.x1 < other.x0 for one, other in pairwise(labels))
    everything = figure.get_tightbbox(drawn)
    assert everything.x0 >= 0 and everything.y0 >= 0
    assert everything.x1 <= figure.get_figwidth() and everything.y1 <= figure.get_figheight()


@pytest.mark.parametrize("count", [1, 4, 5, 12])
def test_a_gallerys_titles_and_caption_cover_nothing(count: int, figures: list[Figure]) -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    mask = np.zeros((64, 64), bool)
    mask[20:40, 20:40] = True
    row = ReportRow(Path("a_rather_long_name.png"), 1, "scratch", 3.5, pixels, np.zeros((64, 64), np.float32), mask)
    gallery(Path("heatmaps.png"), [row] * count, ColorScale.from_model(None, 3))
    (figure,) = figures
    drawn = FigureCanvasAgg(figure).get_renderer()
    *examples, below = (axis.get_tightbbox(drawn) for axis in figure.axes if axis.has_data())
    assert len(examples) == count
    assert all(below.y1 < example.y0 for example in examples)
    for number, one in enumerate(examples):
        assert not any(one.overlaps(other) for other in examples[:number])
    everything = figure.get_tightbbox(drawn)
    assert everything.x0 >= 0 and everything.y0 >= 0
    assert everything.x1 <= figure.get_figwidth() and everything.y1 <= figure.get_figheight()
