"""Plots image scores, and losses and metrics of a training."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..files import written_aside

GOOD, DEFECTIVE, TRAINING = "#2a7fb8", "#d1495b", "#555555"
# A curve of at most so many points has markers.
MARKED_POINTS = 20


def plot_scores(path: Path, labels: np.ndarray, scores: np.ndarray, title: str) -> None:
    """Plots a histogram of the absolute image scores (N,), in nats, of good (label 0) and defective (1) images."""
    figure, axis = _axes()
    positive = np.maximum(scores, 1e-6)
    bins = np.geomspace(positive.min(), positive.max() * 1.001, 41).tolist()
    for label, name, color in ((0, "good", GOOD), (1, "defective", DEFECTIVE)):
        chosen = positive[labels == label]
        axis.hist(chosen, bins=bins, alpha=0.65, label=f"{name} ({len(chosen)})", color=color)
    axis.set(xlabel="absolute image score, nats", ylabel="images", xscale="log")
    axis.set_title(title, parse_math=False)
    axis.legend()
    _save(figure, path)


Points = Sequence[tuple[int, float]]


def plot_training(path: Path, losses: Sequence[float], held_out: Points, metrics: Mapping[str, Points]) -> None:
    """Plots the nll of training and of held-out images, and each metric on a second axis.

    ``losses``: the nll of each pass; ``held_out`` and ``metrics``: points (epoch, value).
    """
    figure, axis = _axes()
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


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _save(figure: Figure, path: Path) -> None:
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=100, format="png")
