"""Views of images: tiles stay inside their image, variants differ by what was asked for, and the first is unchanged."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastmsflow import InputError
from fastmsflow.data.fingerprint import image_digest
from fastmsflow.data.image_tiles import ImageTiles
from fastmsflow.data.image_views import ImageView
from fastmsflow.data.view_dataset import Variation, ViewDataset
from fastmsflow.tiling import Tiling

SIDE = 32
SIZES = [(40, 70), (32, 33)]
IMAGES = [np.random.default_rng(5).integers(0, 256, (*size, 3), np.uint8) for size in SIZES]
MOVED_AND_LIT = Variation(seed=3, light=True, jitter=5, variants=4)


def dataset(variation: Variation, tiling: Tiling | None, images: list | None = None) -> ViewDataset:
    given_images = IMAGES if images is None else images
    tiles = None if tiling is None else ImageTiles(given_images, tiling)
    return ViewDataset(given_images, (SIDE, SIDE), tiles, variation)


def views_of(data: ViewDataset) -> list[ImageView]:
    views = list(data.images)
    assert all(isinstance(view, ImageView) for view in views)
    return views


@given(
    st.lists(st.tuples(st.integers(32, 150), st.integers(32, 150)), min_size=1, max_size=3),
    st.sampled_from([0.0, 0.25, 0.6]),
    st.sampled_from([1.0, 1.7]),
    st.integers(0, 80),
)
def test_moved_tiles_stay_inside_their_image_and_near_their_place(sizes, overlap, scale, jitter) -> None:
    side = 48
    tiling = Tiling(side, overlap, scale)
    images = [np.empty(size, np.uint8) for size in sizes]
    data = dataset(Variation(seed=1, jitter=jitter, variants=3), tiling, images)
    assert data.image_count == len(images) and len(data) == 3 * sum(len(tiling.places(size)) for size in sizes)
    for number, (size, image) in enumerate(zip(sizes, images, strict=True)):
        places = tiling.places(size)
        views = [data.images[item] for item in data.items_of(number)]
        assert len(views) == 3 * len(places)
        for row, view in enumerate(views):
            assert view.image is image
            if row % 3 == 0:
                assert view.place == places[row // 3]
            for start, moved, length in zip(places[row // 3], view.place, tiling.scaled_size(size), strict=True):
                assert 0 <= moved <= max(0, length - side)
                assert abs(moved - start) <= jitter


def test_the_first_variant_is_the_unchanged_tile_and_the_others_all_differ() -> None:
    tiling = Tiling(SIDE)
    plain, varied = views_of(dataset(Variation(seed=3), tiling)), views_of(dataset(MOVED_AND_LIT, tiling))
    digests = [image_digest(view) for view in varied]
    assert digests[::4] == [image_digest(view) for view in plain]
    assert all(view.light is None for view in varied[::4])
    assert len(set(digests)) == len(digests)
    others = [view for number, view in enumerate(varied) if number % 4]
    assert len({view.light for view in others}) == len(others)
    assert any(view.place != plain[number // 4].place for number, view in enumerate(varied))


def test_the_first_variant_of_a_whole_image_has_the_fingerprint_of_the_image() -> None:
    data = dataset(replace(MOVED_AND_LIT, jitter=0), None)
    digests = [image_digest(view) for view in data.images]
    assert digests[::4] == [image_digest(image) for image in IMAGES]
    assert len(set(digests)) == 8


def test_views_are_those_of_their_seed_and_drawn_anew_in_each_epoch_if_they_are_to_be() -> None:
    tiling = Tiling(SIDE)

    def digests(variation: Variation, epoch: int = 0) -> list[str]:
        return [image_digest(view) for view in dataset(variation, tiling).in_epoch(epoch).images]

    kept, drawn = MOVED_AND_LIT, replace(MOVED_AND_LIT, variants=1, epoch=0)
    assert digests(kept) == digests(kept, epoch=1)
    assert digests(kept) != digests(replace(kept, seed=4))
    assert digests(drawn, epoch=1) == digests(drawn, epoch=1)
    anew = [*digests(drawn), *digests(drawn, epoch=1), *digests(replace(drawn, seed=4))]
    assert len(set(anew)) == len(anew)


def test_offsets_are_the_places_of_moved_tiles_in_tiles() -> None:
    data = dataset(MOVED_AND_LIT, Tiling(SIDE, position="image"))
    numbers = [5, 2, 9]
    places = [data.images[number].place for number in numbers]
    assert data.offsets(numbers).tolist() == (torch.tensor(places, dtype=torch.float64) / SIDE).tolist()
    assert dataset(MOVED_AND_LIT, Tiling(SIDE)).offsets(numbers) is None


def test_a_tile_of_a_file_is_read_as_it_lies_in_the_image_and_named(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(IMAGES[0]).save(path)
    data = dataset(Variation(seed=3), Tiling(SIDE), [path])
    top, left = data.images[4].place
    expected = IMAGES[0][top : top + SIDE, left : left + SIDE].transpose(2, 0, 1) / np.float32(255)
    assert np.array_equal(data[4]["image"].numpy(), expected)
    assert data.name(4) == str(path)
    assert data.view_name(4) == f"{path} (tile at {left}, {top})"


def test_an_image_too_small_for_the_scale_is_an_error_that_names_it() -> None:
    with pytest.raises(InputError, match=r"^image 1: 33x32 pixels, times a scale of 0\.5, are 16x16, less than 32"):
        ImageTiles([np.empty((80, 80), np.uint8), IMAGES[1]], Tiling(SIDE, scale=0.5))


def test_views_at_scales_that_hardly_differ_have_other_fingerprints() -> None:
    """A large image may have another number of rows at each."""
    tilings = [Tiling(SIDE, scale=scale) for scale in (0.3333331, 0.3333334, 1, 1.0)]
    digests = [image_digest(ImageView(IMAGES[0], tiling, (0, 0))) for tiling in tilings]
    assert digests[0] != digests[1] and digests[2] == digests[3]


def test_the_name_of_a_tile_that_is_moved_in_each_epoch_tells_no_place_of_another_epoch() -> None:
    views = dataset(Variation(seed=3, jitter=5, epoch=0), Tiling(SIDE, overlap=0))
    assert views.view_name(1) == views.in_epoch(7).view_name(1) == "image 0 (tile near 32, 0)"
