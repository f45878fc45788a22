"""Samples, files and arrays -> tensors, for a DataLoader."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from .image_io import as_tensor, image_of, load_image, load_mask, read_bytes, read_image
from .image_set import Sample
from .jpeg_decoder import decoded_or_not

ToRead = Callable[[], dict[str, Any]]
"""An item that is not read yet, by whatever process that will be."""


class ImageDataset(Dataset[dict[str, Any]]):
    """Samples for a DataLoader, at ``image_size`` (H, W), read when they are asked for.

    Items: ``image`` (3, H, W) float32 in [0, 1], ``mask`` (H, W) bool, ``label`` (1 is defective) and ``index`` int.
    Errors, on reading: InputError that names the file.
    """

    def __init__(self, samples: Sequence[Sample], image_size: tuple[int, int]) -> None:
        self.samples = samples
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.to_read(index)()

    def to_read(self, index: int) -> ToRead:
        """The item without the others."""
        return partial(_sample, self.samples[index], index, self.image_size)


class ImageFileDataset(Dataset[dict[str, Any]]):
    """Images of no set for a DataLoader, at ``image_size`` (H, W).

    ``images``: files, or arrays: grey (H, W) or colour (H, W, 3 or 4) of uint8, or grey of uint16. Items: ``image``
    (3, H, W) float32 in [0, 1]; with ``encoded``, what ``jpegs.decoded`` takes, and ``source``, its name for errors.
    Errors, on reading: InputError that names the file or the array's number.
    """

    def __init__(
        self, images: Sequence[str | Path | np.ndarray], image_size: tuple[int, int], encoded: bool = False
    ) -> None:
        self.images = images
        self.image_size = image_size
        self.encoded = encoded

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.to_read(index)()

    def to_read(self, index: int) -> ToRead:
        """The item without the others."""
        return partial(_loose, self.images[index], index, self.image_size, self.encoded)


def _sample(sample: Sample, index: int, image_size: tuple[int, int]) -> dict[str, Any]:
    return {
        "image": load_image(sample.image, image_size),
        "mask": load_mask(sample, image_size),
        "label": sample.label,
        "index": index,
    }


def _loose(given: str | Path | np.ndarray, index: int, image_size: tuple[int, int], encoded: bool) -> dict[str, Any]:
    name = f"image {index}" if isinstance(given, np.ndarray) else str(given)
    source = {"source": name} if encoded else {}
    if encoded and not isinstance(given, np.ndarray):
        return {"image": decoded_or_not(read_bytes(given), name, image_size), **source}
    image = image_of(given, name) if isinstance(given, np.ndarray) else read_image(given)
    return {"image": as_tensor(image, image_size), **source}
