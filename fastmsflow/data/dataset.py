"""Samples, files and arrays -> tensors, for a DataLoader."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from .image_set import Sample
from .images import as_tensor, image_of, load_image, load_mask, read_image


class ImageDataset(Dataset[dict[str, Any]]):
    """Items: ``image`` (3, H, W) float32 in [0, 1], ``mask`` (H, W) bool, ``label`` and ``index`` int."""

    def __init__(self, samples: Sequence[Sample], image_size: tuple[int, int]) -> None:
        self.samples = samples
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        return {
            "image": load_image(sample.image, self.image_size),
            "mask": load_mask(sample, self.image_size),
            "label": sample.label,
            "index": index,
        }


class LooseImages(Dataset[dict[str, Any]]):
    """Items: ``image`` (3, H, W) float32 in [0, 1]. ``images``: files, or arrays as ``image_of`` takes them."""

    def __init__(self, images: Sequence[str | Path | np.ndarray], image_size: tuple[int, int]) -> None:
        self.images = images
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        given = self.images[index]
        image = image_of(given, f"image {index}") if isinstance(given, np.ndarray) else read_image(given)
        return {"image": as_tensor(image, self.image_size)}
