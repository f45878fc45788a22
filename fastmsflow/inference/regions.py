"""Finds the regions of a score map that lie above a threshold."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..contours import trace_contours


@dataclass(frozen=True)
class Region:
    """One region; coordinates (x, y) are in pixels of the image, from its upper left corner."""

    box: tuple[float, float, float, float]
    """left, top, right, bottom."""
    area: int
    peak: float
    """The map's largest value."""
    outline: np.ndarray
    """(n, 2), closed: the last point is the first. Holes have no outline."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "box": [round(value, 1) for value in self.box],
            "area": self.area,
            "peak": round(self.peak, 4),
            "outline": self.outline.round(1).tolist(),
        }


def find_regions(score_map: np.ndarray, threshold: float, size: tuple[int, int]) -> list[Region]:
    """Returns the connected regions of ``score_map`` (H, W) above ``threshold``, largest first.

    ``size``: (width, height) of the image, in whose pixels the regions are.
    """
    from scipy.ndimage import find_objects, label  # slow to import

    labels, _ = label(score_map > threshold)
    scale = np.array(size) / score_map.shape[::-1]
    regions = []
    for number, (rows, columns) in enumerate(find_objects(labels), start=1):
        inside = labels[rows, columns] == number
        # One pixel more on each side, where the map has one; other regions in this box are hidden.
        top, left = max(rows.start - 1, 0), max(columns.start - 1, 0)
        window = np.s_[top : rows.stop + 1, left : columns.stop + 1]
        values = score_map[window].astype(np.float64)
        hidden = labels[window] != number
        values[hidden] = np.minimum(values[hidden], threshold)
        # A border at the threshold: a region at the map's border has its outline there. The outermost line has the
        # largest box.
        outer = max(trace_contours(values, threshold, border=threshold), key=lambda line: np.ptp(line, axis=0).prod())
        points = (outer + np.array((left, top))).clip(0, score_map.shape[::-1]) * scale
        box = (*points.min(axis=0).tolist(), *points.max(axis=0).tolist())
        area = max(1, round(int(inside.sum()) * float(scale.prod())))
        peak = float(score_map[rows, columns][inside].max())
        regions.append(Region(box, area, peak, points))
    return sorted(regions, key=lambda region: region.area, reverse=True)
