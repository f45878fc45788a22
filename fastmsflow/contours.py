"""Contour lines of score maps and masks."""

import numpy as np
from contourpy import LineType, contour_generator


def trace_contours(values: np.ndarray, level: float, border: float) -> list[np.ndarray]:
    """Returns the lines along which ``values`` (H, W) pass ``level``.

    ``border``: the value around ``values``; one that is not above ``level`` closes every line.

    Returns: arrays (n, 2) of (x, y) in pixels; the upper left corner of the first pixel is (0, 0), its center
    (0.5, 0.5). Lines reach half a pixel beyond the border at most.
    """
    padded = np.pad(values.astype(np.float64), 1, constant_values=border)
    # The padded array's first pixel has its center at (-0.5, -0.5).
    return [np.asarray(line) - 0.5 for line in contour_generator(z=padded, line_type=LineType.Separate).lines(level)]
