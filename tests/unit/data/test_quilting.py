"""A texture that is continued by blocks: whose pixels it has, and where blocks are cut."""

import numpy as np
import pytest
from skimage import data as photographs

from fastmsflow.data import quilting
from fastmsflow.data.quilting import BLOCK, OVERLAP, quilt


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


def test_cuts_show_less_than_blocks_side_by_side() -> None:
    gravel = photographs.gravel()
    plane = quilt(gravel, (400, 400), np.random.default_rng(0)).astype(int)
    step = BLOCK - OVERLAP
    across = np.abs(np.diff(plane, axis=1)).mean(axis=0)
    # Columns of the overlaps of blocks, in which cuts lie, and the others.
    in_overlap = np.array([x >= step and x % step < OVERLAP for x in range(len(across))])
    ratio = across[in_overlap].mean() / across[~in_overlap].mean()
    side_by_side = np.abs(gravel[:, 256:].astype(int) - gravel[:, :256]).mean() / across[~in_overlap].mean()
    assert ratio < 1.1 < side_by_side


def test_a_plane_has_the_texture_s_pixels_and_depends_on_the_seed_alone() -> None:
    texture = photographs.grass()[:120, :130]
    one, two = (quilt(texture, (150, 170), np.random.default_rng(seed)) for seed in (1, 1))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, quilt(texture, (150, 170), np.random.default_rng(2)))
    assert set(np.unique(one)) <= set(np.unique(texture))
