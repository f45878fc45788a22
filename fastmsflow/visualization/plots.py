"""Plots image scores, examples with their heat maps, and losses and metrics of a training."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from ..contours import trace_contours
from ..files import shown, written_aside
from .color_scale import ColorScale
from .heat_maps import COLORMAP, overlay
from .html_report import ReportRow

GOOD, DEFECTIVE, TRAINING = "#2a7fb8", "#d1495b", "#555555"
# A curve of at most so many points has markers.
MARKED_POINTS = 20
GALLERY_COLUMNS = 4


def plot_scores(path: Path, labels: np.ndarray, scores: np.ndarray, title: str) -> None:
    """Plots a histogram of the absolute image scores (N,), in nats, of good (label 0) and defective (1) images."""
    figure = Figure(figsize=(7, 4))
    axis = figure.add_axes((0.13, 0.13, 0.85, 0.79))
    positive = np.maximum(scores, 1e-6)
    bins = np.geomspace(positive.min(), positive.max() * 1.001, 41).tolist()
    for label, name, color in ((0, "good", GOOD), (1, "defective", DEFECTIVE)):
        chosen = positive[labels == label]
        axis.hist(chosen, bins=bins, alpha=0.65, label=f"{name} ({len(chosen)})", color=color)
    axis.set(xlabel="absolute image score, nats", ylabel="images", xscale="log")
    # Powers of ten alone are too few labels within two decades, and matplotlib's own others too many.
    digits = (1.0, 2.0, 5.0) if bins[-1] < 100 * bins[0] else (1.0,)
    axis.xaxis.set_major_locator(MaxNLocator(6) if bins[-1] < 5 * bins[0] else LogLocator(subs=digits))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_title(title, parse_math=False)
    axis.legend()
    _save(figure, path)


def gallery(path: Path, rows: Sequence[ReportRow], color_scale: ColorScale, note: str = "") -> None:
    """Writes a PNG of many images with their heat maps, outlines of their masks, and the color bar.

    ``note`` is added to the color bar's caption.
    """
    lines = -(-len(rows) // GALLERY_COLUMNS)
    width, height = 4.2 * GALLERY_COLUMNS, 2.35 * lines + 1.0
    figure = Figure(figsize=(width, height))
    # Below the images are the color bar and its caption. All sizes are known, so that no layout is sought.
    margins = {"bottom": 0.75 / height, "top": 1 - 0.3 / height, "left": 0.1 / width, "right": 1 - 0.1 / width}
    axes = figure.subplots(
        lines, GALLERY_COLUMNS, squeeze=False, gridspec_kw={**margins, "wspace": 0.04, "hspace": 0.16}
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, row in zip(axes.flat, rows, strict=False):
        axis.imshow(np.concatenate([row.pixels, overlay(row.pixels, row.score_map, color_scale.scale)], axis=1))
        for line in [] if row.mask is None else trace_contours(row.mask, 0.5, border=0):
            # The heat map stands at the right of the image; matplotlib centers the first pixel at (0, 0).
            axis.plot(line[:, 0] + row.pixels.shape[1] - 0.5, line[:, 1] - 0.5, color="white", linewidth=0.8)
        title = f"{shown(row.kind)}  {shown(row.image.stem)}  score {row.score:.2f}"
        axis.set_title(title, fontsize=9, parse_math=False)
    colors = ScalarMappable(Normalize(*color_scale.scale), COLORMAP)
    below = figure.add_axes((0.1, 0.5 / height, 0.8, 0.15 / height))
    figure.colorbar(colors, cax=below, orientation="horizontal", label=f"{color_scale.caption}{note}")
    _save(figure, path, dpi=90)


Points = Sequence[tuple[int, float]]


def plot_training(path: Path, losses: Sequence[float], held_out: Points, metrics: Mapping[str, Points]) -> None:
    """Plots the nll of training and of held-out images, and each metric on a second axis.

    ``losses``: the nll of each pass; ``held_out`` and ``metrics``: points (epoch, value).
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    # One point makes no line.
    marker = "o" if len(losses) <= MARKED_POINTS else None
    passes = range(1, len(losses) + 1)
    axis.plot(passes, losses, color=TRAINING, marker=marker, ms=3, label="nll of training images")
    if held_out:
        epochs, values = zip(*held_out, strict=True)
        axis.plot(epochs, values, "--o", color=TRAINING, mfc="white", ms=4, label="of held-out images")
    axis.set(xlabel="pass over the training images", ylabel="negative log-likelihood, nats an image")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if metrics:
        right = axis.twinx()
        # Otherwise the last points of both axes may cover each other.
        right.margins(y=0.15)
        for name, points in metrics.items():
            right.plot(*zip(*points, strict=True), marker="o", ms=3, label=f"{name} (right)")
        right.set_ylabel("on the test set")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    _save(figure, path)


def _save(figure: Figure, path: Path, dpi: int = 100) -> None:
    figure.set_dpi(dpi)
    if engine := figure.get_layout_engine():
        # savefig would draw everything once more for the layout alone.
        engine.execute(figure)
        figure.set_layout_engine("none")
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=dpi, format="png")
