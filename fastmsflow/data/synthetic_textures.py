"""Draws texture tiles with synthetic defects and exact masks from scikit-image's bundled photographs.

Training tiles come from the photographs' rows 0 to 319, test tiles from rows 320 to 511: no pixel is in both.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Generator = np.random.Generator
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

    The folder is written beside ``target`` and renamed, so it is there whole or not at all. The bytes are the same
    every time.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        _write(aside, photograph, other)
        aside.chmod(0o755)
        aside.rename(target)
    except OSError:
        # Another process may have finished first; its files are the same.
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def training_tiles(photograph: np.ndarray) -> list[np.ndarray]:
    """Returns overlapping tiles, (TILE, TILE) each, of the rows that train."""
    return _tiles(photograph[:TEST_FROM], down=16, across=32)


def held_out_tiles(photograph: np.ndarray) -> list[np.ndarray]:
    """Returns overlapping tiles, (TILE, TILE) each, of the rows that test."""
    return _tiles(photograph[TEST_FROM:], down=16, across=16)


def _write(folder: Path, photograph: np.ndarray, other: np.ndarray) -> None:
    for i, tile in enumerate(training_tiles(photograph)):
        _save(folder / f"train/good/{i:03}.png", tile)
    candidates, patches = held_out_tiles(photograph), held_out_tiles(other)
    order = np.random.default_rng(SEED).permutation(len(candidates))
    for i in range(GOOD_TEST_TILES):
        _save(folder / f"test/good/{i:03}.png", candidates[order[i]])
    for k, (kind, defect) in enumerate(DEFECTS.items()):
        for i in range(TESTS_PER_DEFECT):
            generator = np.random.default_rng([SEED, k, i])
            tile = candidates[order[GOOD_TEST_TILES + k * TESTS_PER_DEFECT + i]]
            image, mask = defect(tile, generator, patches[generator.integers(len(patches))])
            _save(folder / f"test/{kind}/{i:03}.png", image)
            _save(folder / f"ground_truth/{kind}/{i:03}_mask.png", mask.astype(np.uint8) * 255)


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


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


def _blob(generator: Generator, radius: tuple[float, float]) -> np.ndarray:
    """Draws an irregular disc that lies inside the tile."""
    angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    wobble = sum(generator.uniform(0, 0.16) * np.sin(k * angle + generator.uniform(0, 6.3)) for k in (2, 3, 5))
    r = generator.uniform(*radius) * (1 + wobble)
    x, y = generator.uniform(radius[1] * 1.4, TILE - radius[1] * 1.4, 2)
    outline = list(zip((x + r * np.cos(angle)).tolist(), (y + r * np.sin(angle)).tolist(), strict=True))
    return _drawn(lambda canvas: canvas.polygon(outline, fill=1))


def _changed(tile: np.ndarray, mask: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.where(mask, values.clip(0, 255), tile).round().astype(np.uint8), mask


def _blurred(pixels: np.ndarray, radius: float) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)), dtype=np.float64)


def scratch(tile: np.ndarray, generator: Generator, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draws a thin curved line, dark or bright."""
    direction, bend = generator.uniform(0, 2 * np.pi), generator.uniform(-0.25, 0.25)
    x, y = generator.uniform(35, TILE - 35, 2)
    points = [(x, y)]
    for _ in range(int(generator.integers(4, 8))):
        x, y = x + 9 * np.cos(direction), y + 9 * np.sin(direction)
        direction += bend + generator.uniform(-0.15, 0.15)
        points.append((x, y))
    mask = _drawn(lambda canvas: canvas.line(points, fill=1, width=2, joint="curve"))
    level = generator.choice([25, 225])
    return _changed(tile, mask, 0.25 * tile + 0.75 * level)


def stain(tile: np.ndarray, generator: Generator, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draws a soft darker or brighter spot."""
    mask = _blob(generator, (11, 20))
    softness = _blurred(mask.astype(np.uint8) * 255, 3) / 255
    return _changed(tile, mask, tile * (1 + generator.choice([-0.45, 0.5]) * softness))


def hole(tile: np.ndarray, generator: Generator, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draws a small dark disc."""
    return _changed(tile, _blob(generator, (4, 9)), 12 + 0.12 * tile)


def patch(tile: np.ndarray, generator: Generator, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inserts another material at the same brightness."""
    return _changed(tile, _blob(generator, (11, 20)), other + (tile.mean() - other.mean()))


def smear(tile: np.ndarray, generator: Generator, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rubs the texture out, to a slight shine."""
    return _changed(tile, _blob(generator, (13, 22)), _blurred(tile, 4) + 16)


DEFECTS: dict[str, Defect] = {"scratch": scratch, "stain": stain, "hole": hole, "patch": patch, "smear": smear}
