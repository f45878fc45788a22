"""Draws large images with small synthetic defects and exact masks from scikit-image's bundled photographs.

A photograph is not resized: an image is a window of a plane that is quilted from a part of it, without visible seams.
Training images come from rows 0 to 319, test images from rows 320 to 511: no pixel is in both.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from .quilting import quilt
from .sample_cache import save_defective, save_image, write_once
from .synthetic_textures import TEST_FROM, TILE, Defect, Generator, blob, changed, hole, scratch, smear, stain

HEIGHT, WIDTH = 760, 1000
PLANE = (1000, 1400)
"""(H, W) of the plane that the images of a part are windows of."""
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


def windows(texture: np.ndarray, generator: Generator) -> Iterator[np.ndarray]:
    """Yields windows (HEIGHT, WIDTH) uint8, at random places of a plane quilted from ``texture``, without end."""
    plane = quilt(texture, PLANE, generator)
    while True:
        top, left = (int(generator.integers(a - b + 1)) for a, b in zip(PLANE, (HEIGHT, WIDTH), strict=True))
        yield plane[top : top + HEIGHT, left : left + WIDTH]


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
        windows(rows, np.random.default_rng([SEED, number]))
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
    "smear": partial(smear, radius=(4, 9), shine=48),
}
