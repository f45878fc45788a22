"""Regions are what is connected above the threshold."""

import numpy as np
import pytest

from fastmsflow.inference.regions import find_regions


def test_regions_are_what_is_connected_above_the_threshold_largest_first() -> None:
    score_map = np.zeros((20, 30), np.float32)
    score_map[2:4, 2:4] = 5
    score_map[10:20, 20:30] = 3  # in the corner
    score_map[14:16, 24:26] = 0  # a hole
    large, small = find_regions(score_map, 1.0, (300, 100))
    assert (large.area, small.area) == (96 * 50, 4 * 50)
    assert (large.peak, small.peak) == (3, 5)
    assert large.box == pytest.approx((200, 50, 300, 100), abs=10)
    assert large.box[2:] == (300, 100)  # to the image's very border
    assert small.box == pytest.approx((20, 10, 40, 20), abs=10)
    assert find_regions(score_map, 5.0, (300, 100)) == []


def test_regions_in_one_box_have_outlines_of_their_own() -> None:
    score_map = np.zeros((32, 32), np.float32)
    score_map[4:28, 4:28] = 2
    score_map[8:24, 8:24] = 0
    score_map[12:20, 12:20] = 2
    ring, dot = find_regions(score_map, 1.0, (32, 32))
    assert ring.box == pytest.approx((4, 4, 28, 28), abs=0.6)
    assert dot.box == pytest.approx((12, 12, 20, 20), abs=0.6)
