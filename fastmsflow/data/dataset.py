"""Samples -> tensors, for a DataLoader."""

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from .image_set import Sample
from .images import load_image, load_mask


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
