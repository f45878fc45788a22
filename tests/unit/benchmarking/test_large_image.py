"""The large image's script tells a map with seams from one without."""

import numpy as np
import pytest

from benchmarks.large_image import border_ratio, tile_borders


def test_a_seam_raises_the_ratio_of_its_borders_alone() -> None:
    smooth = np.random.default_rng(0).random((200, 300))
    borders = [50, 130]
    assert border_ratio(smooth, borders) == pytest.approx(1, abs=0.1)
    seam = smooth.copy()
    seam[50:130] += 5
    assert border_ratio(seam, borders) > 10
    # The same seam where no border is said to be.
    assert border_ratio(seam, [51, 131]) < 1


def test_borders_are_where_tiles_begin_and_end_inside_the_image() -> None:
    assert tile_borders([0, 48, 96, 96, 100], 64, 164) == [48, 64, 96, 100, 112, 160]
