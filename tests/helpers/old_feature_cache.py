"""Makes the model and the images of the recorded feature cache, and, run as a program, the cache itself."""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from fastmsflow import MSFlow
from fastmsflow.data import ImageFileDataset
from fastmsflow.training.feature_cache import FeatureCache
from tests.helpers.paths import GOLDEN

RECORDED = GOLDEN / "old_feature_cache"
SIZE = (32, 32)
COUNT = 5


def model() -> MSFlow:
    """Returns a model whose weights depend on no version of any library."""
    built = MSFlow("test_resnet.r160_in1k", pretrained=False, image_size=SIZE, blocks=(1, 1, 1))
    for tensor in built.extractor.state_dict().values():
        if tensor.is_floating_point():
            values = torch.arange(tensor.numel(), dtype=torch.float64) * 7919 % 101
            tensor.copy_(((values + 1) / 1010).reshape(tensor.shape))
    return built


def images(folder: Path) -> ImageFileDataset:
    """Returns arrays and one file, which lies in ``folder``."""
    arrays = [((np.arange(40 * 40 * 3) * (i + 3) ** 3 % 251).astype(np.uint8)).reshape(40, 40, 3) for i in range(COUNT)]
    file = folder / "last.ppm"
    file.write_bytes(b"P6 40 40 255\n" + arrays[-1].tobytes())
    return ImageFileDataset([*arrays[:-1], file], SIZE)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        built = model()
        FeatureCache(built, {"train": images(Path(name))}, Path(sys.argv[1]), shard_bytes=3 * 1792).build()
