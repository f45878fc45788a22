"""Draws score maps over images."""

import matplotlib as mpl
import numpy as np

COLORMAP = "turbo"
OPACITY = 0.5


def overlay(image: np.ndarray, score_map: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    """Returns ``image`` (H, W, 3) uint8 under the colored ``score_map`` (H, W).

    ``scale``: the values of the first and the last color. The more abnormal a pixel, the less transparent its color.
    """
    low, high = scale
    # 256 colors take a tenth of the time that a color for every pixel takes.
    step = np.clip((score_map - low) * (255 / max(high - low, 1e-12)), 0, 255).round().astype(np.uint8)
    share = np.linspace(0, 1, 256, dtype=np.float32)[:, None]
    opacity = OPACITY * np.sqrt(share)
    colors = mpl.colormaps[COLORMAP](share[:, 0])[:, :3].astype(np.float32) * 255 * opacity
    return (image * (1 - opacity)[step] + colors[step]).round().astype(np.uint8)
