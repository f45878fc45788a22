"""An image set of noise: for what does not look at the images."""

from pathlib import Path

import torch
from PIL import Image

from fastmsflow.data import ImageSet, folder


def noise_set(root: Path, train: int, test: int = 3) -> ImageSet:
    """``train`` good images to learn from, ``test`` good and as many defective ones to test on; 40x40, no masks."""
    generator = torch.Generator().manual_seed(5)
    for kind, count in (("train", train), ("test/good", test), ("test/bad", test)):
        (root / kind).mkdir(parents=True)
        for i in range(count):
            pixels = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8, generator=generator).numpy()
            Image.fromarray(pixels).save(root / kind / f"{i}.png")
    return folder(root / "train", root / "test")
