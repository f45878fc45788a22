"""The pictures and tables of an evaluated test set."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from ..data import ImageSet, Sample, load_image, load_mask
from ..files import written_aside
from .heat_maps import Panel, gallery
from .plots import plot_scores

# Heat maps show the additive map: the one made for localisation. It lies between 0 and the number of levels.
HEAT_SCALE = (0.0, 3.0)
CAPTION = "additive score map (0: normal, 3: abnormal at every level)"


def as_pixels(image: torch.Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1] -> (H, W, 3) uint8."""
    return (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def write_test_report(
    out: Path,
    images: ImageSet,
    image_size: tuple[int, int],
    score: np.ndarray,
    log_score: np.ndarray,
    score_map: np.ndarray,
) -> None:
    """``scores.csv``, ``scores.png`` (histogram) and ``heatmaps.png`` (examples of every height of score) into ``out``.

    ``score``, ``log_score``: (N,) in the order of ``images.test``; ``score_map``: (N, H, W).
    """
    labels = np.array([sample.label for sample in images.test])
    rows = zip(images.test, score, log_score, strict=True)
    write_table(
        out / "scores.csv",
        ("image", "label", "kind", "score", "log_score"),
        ((sample.image, sample.label, sample.kind, float(s), float(log)) for sample, s, log in rows),
    )
    plot_scores(out / "scores.png", labels, log_score, f"{images.name}: image scores of the test set")
    chosen = [*_spread(np.flatnonzero(labels == 1), log_score, 8), *_spread(np.flatnonzero(labels == 0), log_score, 4)]
    panels = [_panel(images.test[i], image_size, log_score[i], score_map[i]) for i in chosen]
    gallery(out / "heatmaps.png", panels, HEAT_SCALE, CAPTION)


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """CSV, written aside and renamed."""
    with written_aside(path) as aside, aside.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def _spread(indices: np.ndarray, score: np.ndarray, count: int) -> list[int]:
    """``count`` of ``indices``, evenly spaced from the highest score to the lowest: no flattering choice."""
    ordered = indices[np.argsort(-score[indices], kind="stable")]
    return ordered[np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int)].tolist()


def _panel(sample: Sample, image_size: tuple[int, int], log_score: float, score_map: np.ndarray) -> Panel:
    mask = load_mask(sample, image_size).numpy() if sample.mask is not None else None
    title = f"{sample.kind}  {sample.image.stem}  log score {log_score:.2f}"
    return Panel(as_pixels(load_image(sample.image, image_size)), score_map, title, mask)
