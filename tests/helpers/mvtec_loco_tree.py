"""Writes a tiny class in the layout of MVTec LOCO AD."""

from pathlib import Path

import numpy as np
from PIL import Image

VALUES = {"logical_anomalies": (1, 200), "structural_anomalies": (255,)}
"""The values of the masks of an image, one of each defect: they number the kinds of defects."""
BRIGHTNESS = {"logical_anomalies": 240, "structural_anomalies": 128}
"""The defects' values: those of one kind are easily found, those of the other are not."""


def write_mvtec_loco(base: Path, *, size: tuple[int, int] = (48, 64), images: int = 3) -> Path:
    """Writes a class into ``base``, which it returns: ``images`` gray images of ``size`` (H, W) in each folder, 6 to
    train on. A defective one has a square of 6 pixels' side for each of its masks."""
    random = np.random.default_rng(4)
    for split, count in (("train/good", 6), ("validation/good", images), ("test/good", images)):
        for i in range(count):
            _save(base / f"{split}/{i:03}.png", _texture(size, random))
    for kind, values in VALUES.items():
        for i in range(images):
            image = _texture(size, random)
            for number, value in enumerate(values):
                mask = np.zeros(size, dtype=np.uint8)
                mask[8 + 3 * i :, 10 + 20 * number :][:6, :6] = value
                image[mask > 0] = BRIGHTNESS[kind]
                _save(base / f"ground_truth/{kind}/{i:03}/{number:03}.png", mask)
            _save(base / f"test/{kind}/{i:03}.png", image)
    return base


def _texture(size: tuple[int, int], random: np.random.Generator) -> np.ndarray:
    return random.integers(90, 130, size, dtype=np.uint8)


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
