"""Checks, before features are computed, that they fit in memory."""

import math
from collections.abc import Mapping

from ..available_memory import available_memory
from ..data.datasets import ImageFileDataset
from ..distributed.process_group import ProcessGroup
from ..errors import InputError
from ..models.msflow import MSFlow
from ..nn.feature_extractor import FeatureExtractor
from .feature_cache import binary


def check_memory(model: MSFlow, images: Mapping[str, ImageFileDataset], world: ProcessGroup, shared: str) -> None:
    """Raises: InputError if the features of all splits in ``images`` are larger than the memory that is free.

    Each process holds those of the split ``shared``, and those of its own part of the other splits.
    """
    extractor, free = model.extractor, available_memory()
    # A system that does not tell how much is free has 0.
    if not isinstance(extractor, FeatureExtractor) or not free:
        return
    others = sum(len(of_split) for split, of_split in images.items() if split != shared)
    rows = len(images[shared]) * world.local_size + others * world.local_size // world.size
    needed = rows * _feature_bytes(extractor, model)
    if needed <= free:
        return
    remedies = ["--feature-cache DIR", "--stream"]
    if images[shared].tiles is not None:
        remedies.append("a smaller --overlap or --scale")
    if images[shared].variants > 1:
        remedies.append("fewer --augment-variants")
    raise InputError(
        f"the features of {len(images[shared]) + others} {images[shared].unit} take {binary(needed)} of"
        f" memory, and {binary(free)} are free; give {' or '.join(remedies)}"
    )


def _feature_bytes(extractor: FeatureExtractor, model: MSFlow) -> int:
    """Returns the size of the pooled features of one image or, where a backbone rounds sides down, a little more."""
    pooled = 1 if model.pool == "none" else 2
    values = sum(
        channels * math.prod(-(-side // (stride * pooled)) for side in model.image_size)
        for channels, stride in zip(extractor.channels, extractor.strides, strict=True)
    )
    return values * extractor.dtype.itemsize
