"""Draws large images with small synthetic defects and exact masks from scikit-image's bundled photographs.

A photograph is not resized: an image is a window of the plane that continues a part of it by reflection. Training
images continue rows 0 to 319, test images rows 320 to 511: no pixel is in both.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from ..tiling import reflected
from .sample_cache import save_defective, save_image, write_once
from .synthetic_textures import TEST_FROM, TILE, Defect, Generator, blob, changed, hole, scratch, smear, stain

HEIGHT, WIDTH = 760, 1000
TRAINING_IMAGES = 24
GOOD_TEST_IMAGES = 20
TESTS_PER_DEFECT = 6
MOST_DEFECTS = 3
EXTENT = (6, 20)
"""The least and the largest side in pixels of a defect's bounding box, the longer one of each."""
LEAST_CHANGE = 40
"""The least mean change of a defect's pixels, of 255: on these textures less is hard to see at full size."""
APART = 32
"""The fewest pixels between two defects."""
SEED = 6208


def write_small_defects(target: Path, photograph: np.ndarray) -> None:
    """Writes ``photograph`` (512, 512) uint8 as a class in the MVTec AD layout.

    See ``write_once``: the folder is there whole or not at all. The bytes are the same every time.
    """
    write_once(target, partial(_write, photograph=photograph))


def mirrored_windows(region: np.ndarray, generator: Generator, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yields windows of ``size`` (H, W), at random places of the plane that continues ``region`` (H, W, ...) by
    reflection, without end."""
    while True:
        starts = [int(generator.integers(2 * (length - 1))) for length in region.shape[:2]]
        rows, columns = (
            reflected(start, count, length).numpy()
            for start, count, length in zip(starts, size, region.shape, strict=False)
        )
        yield region[np.ix_(rows, columns)]


def with_small_defects(image: np.ndarray, draw: Defect, generator: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws one to three defects apart from each other; returns the defective image and its mask (H, W) bool.

    ``image``: (H, W) uint8, larger than TILE; ``draw``: called until a defect has an EXTENT and a LEAST_CHANGE.
    """
    image, mask = image.copy(), np.zeros(image.shape, dtype=bool)
    left = int(generator.integers(1, MOST_DEFECTS + 1))
    while left:
        top, start = (int(generator.integers(length - TILE + 1)) for length in image.shape)
        window = slice(top, top + TILE), slice(start, start + TILE)
        before = image[window]
        after, drawn = draw(before, generator, before)
        rows, columns = (np.flatnonzero(drawn.any(axis=axis)) for axis in (1, 0))
        extent = max(np.ptp(rows), np.ptp(columns)) + 1
        change = np.abs(after[drawn].astype(float) - before[drawn]).mean()
        around = tuple(
            slice(max(0, first + place[0] - APART), first + place[-1] + APART + 1)
            for first, place in ((top, rows), (start, columns))
        )
        if EXTENT[0] <= extent <= EXTENT[1] and change >= LEAST_CHANGE and not mask[around].any():
            image[window] = after
            mask[window] |= drawn
            left -= 1
    return image, mask


def particle(tile: np.ndarray, generator: Generator, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lays a smooth bright grain on the material, lit from the upper left."""
    mask = blob(generator, (3, 8))
    rows, columns = np.nonzero(mask)
    slope = np.add.outer(np.arange(TILE) - rows.mean(), np.arange(TILE) - columns.mean())
    return changed(tile, mask, 205 - 60 * slope / np.abs(slope[mask]).max())


def _write(folder: Path, photograph: np.ndarray) -> None:
    training, test = (
        mirrored_windows(rows, np.random.default_rng([SEED, number]), (HEIGHT, WIDTH))
        for number, rows in enumerate((photograph[:TEST_FROM], photograph[TEST_FROM:]))
    )
    for i in range(TRAINING_IMAGES):
        save_image(folder / f"train/good/{i:03}.png", next(training))
    for i in range(GOOD_TEST_IMAGES):
        save_image(folder / f"test/good/{i:03}.png", next(test))
    for k, (kind, draw) in enumerate(SMALL_DEFECTS.items()):
        for i in range(TESTS_PER_DEFECT):
            image, mask = with_small_defects(next(test), draw, np.random.default_rng([SEED, 2, k, i]))
            save_defective(folder, f"{kind}/{i:03}", image, mask)


SMALL_DEFECTS: dict[str, Defect] = {
    "scratch": partial(scratch, step=2.6),
    "stain": partial(stain, radius=(4, 9), softness=1, changes=(-0.6, 0.65)),
    "hole": partial(hole, radius=(3, 7)),
    "particle": particle,
    "smear": partial(smear, radius=(4, 9), shine=40),
}
