"""Regions of a score map above a threshold."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from contourpy import LineType, contour_generator


@dataclass(frozen=True)
class Region:
    """All in pixels of the image, from its upper left corner; (x, y)."""

    box: tuple[float, float, float, float]
    """left, top, right, bottom."""
    area: int
    peak: float
    """The map's largest value."""
    outline: np.ndarray
    """(n, 2), closed: the last point is the first. Holes are not outlined."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "box": [round(value, 1) for value in self.box],
            "area": self.area,
            "peak": round(self.peak, 4),
            "outline": self.outline.round(1).tolist(),
        }


def find_regions(score_map: np.ndarray, threshold: float, size: tuple[int, int]) -> list[Region]:
    """What is connected and above ``threshold`` in ``score_map`` (H, W), largest first; ``size``: (width, height) of
    the image that the map is of."""
    from scipy.ndimage import find_objects, label  # slow to import

    labels, _ = label(score_map > threshold)
    scale = np.array(size) / score_map.shape[::-1]
    # A rim at the threshold, so that a region at the map's border has its outline there.
    rim = np.pad(score_map.astype(np.float64), 1, constant_values=threshold)
    regions = []
    for number, (rows, columns) in enumerate(find_objects(labels), start=1):
        inside = labels[rows, columns] == number
        around = rim[rows.start : rows.stop + 2, columns.start : columns.stop + 2].copy()
        here = np.pad(inside, 1)
        # Of other regions in the same box nothing is seen.
        around[~here] = np.minimum(around[~here], threshold)
        lines = contour_generator(z=around, line_type=LineType.Separate).lines(threshold)
        outer = max(map(np.asarray, lines), key=_extent)
        # From centres of the rimmed map's pixels to places on the map.
        corner = np.array((columns.start, rows.start)) - 0.5
        points = (outer + corner).clip(0, score_map.shape[::-1]) * scale
        left, top = points.min(axis=0).tolist()
        right, bottom = points.max(axis=0).tolist()
        area = max(1, round(int(inside.sum()) * float(scale.prod())))
        peak = float(around[here].max())
        regions.append(Region((left, top, right, bottom), area, peak, points))
    return sorted(regions, key=lambda region: region.area, reverse=True)


def _extent(line: np.ndarray) -> float:
    """The area of a line's bounding box: largest for the outermost."""
    return float(np.ptp(line, axis=0).prod())
