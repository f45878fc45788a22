"""Writes a tiny tree in the layout of MVTec AD 2."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fastmsflow.data.layouts.mvtec_ad_2 import OBJECTS

LIGHTS = ("regular", "overexposed", "underexposed", "shift_1")
COUNTS = {"train": 4, "validation": 2, "good": 2, "bad": 2, "test_private": 3, "test_private_mixed": 3}


def write_mvtec_ad_2(
    root: Path,
    *,
    objects: Sequence[str] = OBJECTS,
    size: tuple[int, int] = (48, 64),
    counts: Mapping[str, int] | None = None,
) -> Path:
    """Writes ``objects`` below ``root``, which it returns: gray images of ``size`` (H, W) with a small bright defect
    where they are bad, and its mask.

    ``counts``: takes the place of entries of COUNTS.
    """
    for number, name in enumerate(objects):
        _write_object(root / name, size, COUNTS | dict(counts or {}), np.random.default_rng(number))
    return root


def _write_object(base: Path, size: tuple[int, int], counts: Mapping[str, int], random: np.random.Generator) -> None:
    for split, folder in (("train", "train/good"), ("validation", "validation/good"), ("good", "test_public/good")):
        for i in range(counts[split]):
            _save(base / folder / f"{i:03}_regular.png", _texture(size, random))
    for i in range(counts["bad"]):
        image, mask = _with_defect(_texture(size, random), random)
        _save(base / f"test_public/bad/{i:03}_regular.png", image)
        _save(base / f"test_public/ground_truth/bad/{i:03}_regular_mask.png", mask)
    for i in range(counts["test_private"]):
        _save(base / f"test_private/{i:03}_regular.png", _maybe_defective(i, size, random))
    for i in range(counts["test_private_mixed"]):
        light = LIGHTS[i % len(LIGHTS)]
        _save(base / f"test_private_mixed/{i:03}_{light}.png", _maybe_defective(i, size, random))


def _texture(size: tuple[int, int], random: np.random.Generator) -> np.ndarray:
    return random.integers(90, 130, size, dtype=np.uint8)


def _with_defect(image: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns the image with a square defect of an eighth of its shorter side, and the mask of it, 0 and 255."""
    side = max(2, min(image.shape) // 8)
    top, left = (int(random.integers(0, length - side + 1)) for length in image.shape)
    mask = np.zeros_like(image)
    mask[top : top + side, left : left + side] = 255
    return np.maximum(image, mask // 255 * 240), mask


def _maybe_defective(number: int, size: tuple[int, int], random: np.random.Generator) -> np.ndarray:
    image = _texture(size, random)
    return _with_defect(image, random)[0] if number % 2 else image


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
