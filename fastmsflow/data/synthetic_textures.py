"""Draws texture tiles with synthetic defects and exact masks from scikit-image's bundled photographs.

Training tiles come from the photographs' rows 0 to 319, test tiles from rows 320 to 511: no pixel is in both.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .sample_cache import save_defective, save_image, write_once

Generator = np.random.Generator
Range = tuple[float, float]
# Takes a tile, random numbers and a tile of another texture; returns the defective tile and its mask.
Defect = Callable[[np.ndarray, Generator, np.ndarray], tuple[np.ndarray, np.ndarray]]

TILE = 128
TEST_FROM = 320
GOOD_TEST_TILES = 40
TESTS_PER_DEFECT = 12
SEED = 9826


def write_textures(target: Path, photograph: np.ndarray, other: np.ndarray) -> None:
    """Writes ``photograph`` (512, 512) uint8 as a class in the MVTec AD layout; ``other``: another texture, for
    patches.

    See ``write_once``: the folder is there whole or not at all. The bytes are the same every time.
    """
    write_once(target, lambda folder: _write(folder, photograph, other))


def training_tiles(photograph: np.ndarray) -> list[np.ndarray]:
    """Returns overlapping tiles, (TILE, TILE) each, of the rows that train."""
    return _tiles(photograph[:TEST_FROM], down=16, across=32)


def held_out_tiles(photograph: np.ndarray) -> list[np.ndarray]:
    """Returns overlapping tiles, (TILE, TILE) each, of the rows that test."""
    return _tiles(photograph[TEST_FROM:], down=16, across=16)


def _write(folder: Path, photograph: np.ndarray, other: np.ndarray) -> None:
    for i, tile in enumerate(training_tiles(photograph)):
        save_image(folder / f"train/good/{i:03}.png", tile)
    candidates, patches = held_out_tiles(photograph), held_out_tiles(other)
    order = np.random.default_rng(SEED).permutation(len(candidates))
    for i in range(GOOD_TEST_TILES):
        save_image(folder / f"test/good/{i:03}.png", candidates[order[i]])
    for k, (kind, defect) in enumerate(DEFECTS.items()):
        for i in range(TESTS_PER_DEFECT):
            generator = np.random.default_rng([SEED, k, i])
            tile = candidates[order[GOOD_TEST_TILES + k * TESTS_PER_DEFECT + i]]
            image, mask = defect(tile, generator, patches[generator.integers(len(patches))])
            save_defective(folder, f"{kind}/{i:03}", image, mask)


def _tiles(region: np.ndarray, down: int, across: int) -> list[np.ndarray]:
    height, width = region.shape
    return [
        region[y : y + TILE, x : x + TILE]
        for y in range(0, height - TILE + 1, down)
        for x in range(0, width - TILE + 1, across)
    ]


def _drawn(draw: Callable[[ImageDraw.ImageDraw], None]) -> np.ndarray:
    canvas = Image.new("1", (TILE, TILE))
    draw(ImageDraw.Draw(canvas))
    return np.array(canvas)


def blob(generator: Generator, radius: Range) -> np.ndarray:
    """Returns the mask (TILE, TILE) bool of an irregular disc that lies inside the tile; ``radius``: least and largest
    mean radius in pixels."""
    angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    wobble = sum(generator.uniform(0, 0.16) * np.sin(k * angle + generator.uniform(0, 6.3)) for k in (2, 3, 5))
    r = generator.uniform(*radius) * (1 + wobble)
    x, y = generator.uniform(radius[1] * 1.4, TILE - radius[1] * 1.4, 2)
    outline = list(zip((x + r * np.cos(angle)).tolist(), (y + r * np.sin(angle)).tolist(), strict=True))
    return _drawn(lambda canvas: canvas.polygon(outline, fill=1))


def changed(tile: np.ndarray, mask: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns ``tile`` with ``values`` where ``mask`` is set, and ``mask``: what a Defect returns."""
    return np.where(mask, values.clip(0, 255), tile).round().astype(np.uint8), mask


def _blurred(pixels: np.ndarray, radius: float) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)), dtype=np.float64)


def scratch(
    tile: np.ndarray, generator: Generator, other: np.ndarray, *, step: float = 9
) -> tuple[np.ndarray, np.ndarray]:
    """Draws a thin curved line, dark or bright; ``step``: the length in pixels of each of its 4 to 7 parts."""
    direction, bend = generator.uniform(0, 2 * np.pi), generator.uniform(-0.25, 0.25)
    x, y = generator.uniform(35, TILE - 35, 2)
    points = [(x, y)]
    for _ in range(int(generator.integers(4, 8))):
        x, y = x + step * np.cos(direction), y + step * np.sin(direction)
        direction += bend + generator.uniform(-0.15, 0.15)
        points.append((x, y))
    mask = _drawn(lambda canvas: canvas.line(points, fill=1, width=2, joint="curve"))
    level = generator.choice([25, 225])
    return changed(tile, mask, 0.25 * tile + 0.75 * level)


def stain(
    tile: np.ndarray,
    generator: Generator,
    other: np.ndarray,
    *,
    radius: Range = (11, 20),
    softness: float = 3,
    changes: Range = (-0.45, 0.5),
) -> tuple[np.ndarray, np.ndarray]:
    """Draws a darker or brighter spot, by one of two relative ``changes``, with a border blurred by ``softness``
    pixels."""
    mask = blob(generator, radius)
    strength = _blurred(mask.astype(np.uint8) * 255, softness) / 255
    return changed(tile, mask, tile * (1 + generator.choice(changes) * strength))


def hole(
    tile: np.ndarray, generator: Generator, other: np.ndarray, *, radius: Range = (4, 9)
) -> tuple[np.ndarray, np.ndarray]:
    """Draws a small dark disc."""
    return changed(tile, blob(generator, radius), 12 + 0.12 * tile)


def patch(tile: np.ndarray, generator: Generator, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inserts another material at the same brightness."""
    return changed(tile, blob(generator, (11, 20)), other + (tile.mean() - other.mean()))


def smear(
    tile: np.ndarray, generator: Generator, other: np.ndarray, *, radius: Range = (13, 22), shine: float = 16
) -> tuple[np.ndarray, np.ndarray]:
    """Rubs the texture out, to a slight shine: brighter by ``shine`` of 255."""
    return changed(tile, blob(generator, radius), _blurred(tile, 4) + shine)


DEFECTS: dict[str, Defect] = {"scratch": scratch, "stain": stain, "hole": hole, "patch": patch, "smear": smear}
