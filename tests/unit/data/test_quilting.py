"""A texture that is continued by blocks: whose pixels it has, and where blocks are cut."""

import numpy as np
import pytest
from skimage import data as photographs

from fastmsflow.data import quilting
from fastmsflow.data.quilting import quilt


def test_a_regular_texture_goes_on_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quilting, "CANDIDATES", 4000)
    # Any of 4 x 4 places continues it exactly.
    texture = np.tile(
        np.array([[0, 90, 40, 200]], dtype=np.uint8).T + np.array([0, 7, 30, 11], dtype=np.uint8), (35, 40)
    )
    plane = quilt(texture, (230, 310), np.random.default_rng(0))
    assert plane.shape == (230, 310) and plane.dtype == np.uint8
    assert np.array_equal(plane[4:], plane[:-4])
    assert np.array_equal(plane[:, 4:], plane[:, :-4])


def test_no_line_between_blocks_shows() -> None:
    plane = quilt(photographs.gravel(), (400, 400), np.random.default_rng(0)).astype(int)
    for pixels in (plane, plane.T):
        steps = np.abs(np.diff(pixels, axis=1)).mean(axis=0)
        # Blocks that are cut along straight lines reach 2.6.
        assert steps.max() < 2 * np.median(steps)


def test_a_plane_has_the_texture_s_pixels_and_depends_on_the_seed_alone() -> None:
    texture = photographs.grass()[:120, :130]
    one, two = (quilt(texture, (150, 170), np.random.default_rng(seed)) for seed in (1, 1))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, quilt(texture, (150, 170), np.random.default_rng(2)))
    assert set(np.unique(one)) <= set(np.unique(texture))
