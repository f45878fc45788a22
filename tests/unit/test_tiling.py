"""Tests the geometry of tiles: places, windows and the continuation by reflection."""

import numpy as np
import pytest
import torch

from fastmsflow import InputError
from fastmsflow.tiling import MOST_TILES, Tiling, cut_tile, reflected
from tests.helpers.tolerances import BLENDED

OVERLAPS = [0.0, 0.25, 0.5, 0.8]


@pytest.mark.parametrize("size", [(32, 32), (33, 64), (40, 200), (95, 131)])
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_tiles_cover_the_image_and_the_last_ones_end_with_it(size: tuple[int, int], overlap: float) -> None:
    tiling = Tiling(32, overlap)
    covered = np.zeros(size, int)
    for top, left in tiling.places(size):
        assert 0 <= top <= size[0] - 32
        assert 0 <= left <= size[1] - 32
        covered[top : top + 32, left : left + 32] += 1
    assert covered.min() >= 1
    assert covered[-1, -1] >= 1
    tops, lefts = (sorted(set(starts)) for starts in zip(*tiling.places(size), strict=True))
    for starts, length in ((tops, size[0]), (lefts, size[1])):
        assert starts[-1] == max(0, length - 32)
        # All steps but the last are those of the overlap.
        assert set(np.diff(starts)[:-1]) <= {round(32 * (1 - overlap))}


def test_an_image_that_is_smaller_than_a_tile_has_one_tile() -> None:
    assert Tiling(64).places((40, 60)) == [(0, 0)]
    assert Tiling(64).places((40, 100)) == [(0, 0), (0, 36)]


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("length", [20, 32, 33, 57, 64, 131])
def test_the_windows_of_all_tiles_sum_to_one_at_every_pixel(length: int, overlap: float) -> None:
    total = torch.zeros(max(length, 32))
    for start, window in Tiling(32, overlap).weights(length):
        assert window.min() > 0
        total[start : start + 32] += window
    assert (total - 1).abs().max() <= BLENDED


def test_a_pixel_that_one_tile_covers_has_exactly_its_value() -> None:
    (start, window), *_ = Tiling(32, 0.25).weights(100)
    assert start == 0
    assert torch.equal(window[:24], torch.ones(24))


def test_a_window_rises_without_a_step_over_the_overlap() -> None:
    windows = Tiling(64, 0.25).weights(112)
    steps = torch.cat([window.diff().abs() for _, window in windows])
    # A linear rise over 16 pixels has steps of 1/16, a squared sine's largest is pi / 2 times as large.
    assert steps.max() <= 1.6 / 16


@pytest.mark.parametrize("length", [1, 2, 3, 7, 30])
def test_a_side_is_continued_as_numpy_reflects(length: int) -> None:
    pixels = np.arange(length)
    expected = np.pad(pixels, (0, 40), mode="reflect")
    np.testing.assert_array_equal(pixels[reflected(0, length + 40, length).numpy()], expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_tile_of_a_small_image_is_its_reflection(dtype: torch.dtype) -> None:
    image = (torch.rand(3, 20, 50, generator=torch.Generator().manual_seed(0)) * 255).to(dtype)
    expected = np.pad(image.numpy(), ((0, 0), (0, 12), (0, 0)), mode="reflect")[:, :, 18:50]
    np.testing.assert_array_equal(cut_tile(image, (0, 18), 32).numpy(), expected)


def test_a_scale_changes_the_image_that_is_cut() -> None:
    tiling = Tiling(32, 0.0, 0.5)
    assert tiling.scaled_size((101, 128)) == (50, 64)
    assert tiling.places((101, 128)) == [(0, 0), (0, 32), (18, 0), (18, 32)]


def test_offsets_are_places_in_tiles_or_none() -> None:
    assert Tiling(32).offsets([(0, 0), (16, 48)]) is None
    offsets = Tiling(32, position="image").offsets([(0, 0), (16, 48)])
    assert offsets is not None
    assert offsets.tolist() == [[0, 0], [0.5, 1.5]]


def test_a_tiling_is_read_from_its_configuration() -> None:
    tiling = Tiling(96, 0.5, 2.0, "image", 0.001)
    assert Tiling.from_config(tiling.config) == tiling
    assert Tiling.from_config(None) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 31}, "tile is 31; it must be a whole number, 32 to 65536"),
        ({"overlap": 1}, "overlap is 1; it must be 0 or more, below 1"),
        ({"overlap": -0.1}, r"overlap is -0\.1; it must be 0 or more, below 1"),
        ({"scale": 0}, "scale is 0; it must be above 0, at most 16"),
        ({"position": "center"}, "position 'center' is not known; choose one of tile, image"),
        ({"top_share": 0}, "top_share is 0; it must be above 0, at most 1"),
    ],
)
def test_a_tiling_that_cannot_be_is_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}$"):
        Tiling(**{"tile": 64, **options})


@pytest.mark.parametrize(
    ("tiling", "size", "message"),
    [
        (
            Tiling(64, scale=0.1),
            (300, 400),
            "x: 400x300 pixels, times a scale of 0.1, are 40x30, less than 32 on a side",
        ),
        (
            Tiling(64, scale=16),
            (4000, 4000),
            "x: 4000x4000 pixels, times a scale of 16, are 64000x64000, more than 268",
        ),
        (
            Tiling(64, 0.999),
            (400, 400),
            f"x: 113569 tiles of 64x64 with an overlap of 0.999, more than {MOST_TILES}; gi",
        ),
    ],
)
def test_an_image_that_cannot_be_cut_is_named(tiling: Tiling, size: tuple[int, int], message: str) -> None:
    with pytest.raises(InputError) as raised:
        tiling.places(size, "x")
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)
