"""Score maps over images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ..files import written_aside

COLOURS = "turbo"
OPACITY = 0.5


@dataclass(frozen=True)
class Panel:
    """One row of a gallery."""

    image: np.ndarray
    """(H, W, 3) uint8."""
    score_map: np.ndarray
    """(H, W)."""
    title: str
    mask: np.ndarray | None = None
    """(H, W) bool: true defects, outlined on the heat map."""


def overlay(image: np.ndarray, score_map: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    """``image`` (H, W, 3) uint8 under the coloured ``score_map`` (H, W); ``scale``: the values of its first and last
    colour. The more abnormal, the less transparent."""
    low, high = scale
    # Of 256 steps: a tenth of the time that every pixel's own colour takes.
    step = np.clip((score_map - low) * (255 / max(high - low, 1e-12)), 0, 255).round().astype(np.uint8)
    share = np.linspace(0, 1, 256, dtype=np.float32)[:, None]
    opacity = OPACITY * np.sqrt(share)
    colours = mpl.colormaps[COLOURS](share[:, 0])[:, :3].astype(np.float32) * 255 * opacity
    return (image * (1 - opacity)[step] + colours[step]).round().astype(np.uint8)


def gallery(path: Path, panels: Sequence[Panel], scale: tuple[float, float], caption: str, columns: int = 4) -> None:
    """Many images with their heat maps on one PNG, with the colour scale."""
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.35 * rows + 1.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, panel in zip(axes.flat, panels, strict=False):
        height, width = panel.score_map.shape
        axis.imshow(np.concatenate([panel.image, overlay(panel.image, panel.score_map, scale)], axis=1))
        if panel.mask is not None and panel.mask.any():
            across, down = np.arange(width) + width, np.arange(height)
            axis.contour(across, down, panel.mask, levels=[0.5], colors="white", linewidths=0.8)
        axis.set_title(panel.title, fontsize=9, parse_math=False)
    colours = ScalarMappable(Normalize(*scale), COLOURS)
    figure.colorbar(colours, ax=axes, location="bottom", fraction=0.03, aspect=60, label=caption)
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=90, format="png")
