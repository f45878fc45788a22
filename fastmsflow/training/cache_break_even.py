"""Measures, before a feature cache is built, whether building it is worth its time."""

import math
import os
import tempfile
from dataclasses import dataclass

import torch

from ..evaluation.evaluate import Stopwatch
from ..files import write_faults
from .feature_cache import FeatureCache, binary
from .features_in_memory import pooled_features

# Enough for an estimate: their features are tens of MiB.
MEASURED_IMAGES = 8


@dataclass(frozen=True)
class BreakEven:
    """The cost of building a cache, and what the cache saves in every pass over the images."""

    images: int
    """The number of images whose features are still to be computed."""
    bytes_per_image: int
    """The size of an image's features on disk."""
    extract: float
    """Seconds to read an image and compute its features."""
    write: float
    """Seconds to write an image's features."""
    read: float
    """Seconds to read an image's features."""
    tiled: bool = False
    """True if the images are tiles."""

    def __str__(self) -> str:
        gain = "never pays off here: the disk is slower than the extractor"
        if self.read < self.extract:
            # After so many passes, building and reading took no longer than computing the features anew in each.
            gain = f"pays off from pass {math.ceil((self.extract + self.write) / (self.extract - self.read))}"
        size, total = binary(self.bytes_per_image), binary(self.images * self.bytes_per_image)
        # One process builds it.
        building = _duration(self.images * (self.extract + self.write))
        one = "a tile" if self.tiled else "an image"
        return f"cache: {size} {one}, {total} in all; building takes about {building}; {gain}"


def measure_break_even(cache: FeatureCache) -> BreakEven:
    """Runs ``cache``'s extractor on a few of its images, writes their features onto its disk and reads them again.

    Raises: InputError if an image cannot be read or the disk cannot be written.
    """
    few = range(min(MEASURED_IMAGES, len(cache.images)))
    pooled_features(cache.model, cache.images, few[:1])  # a first call does work that is not repeated
    stopwatch = Stopwatch(next(cache.model.parameters()).device)
    with stopwatch("extract"):
        levels = pooled_features(cache.model, cache.images, few)
    content = torch.cat([level.to(cache.dtype).flatten().view(torch.uint8) for level in levels]).numpy().tobytes()
    # The file has no name, so that nothing of it can be left behind.
    with write_faults(cache.folder / "speed"), tempfile.TemporaryFile(dir=cache.folder) as file:
        with stopwatch("write"):
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            # To be read from the disk, not from memory.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        with stopwatch("read"):
            file.read()
    extract, write, read = (stopwatch.seconds[stage] / len(few) for stage in ("extract", "write", "read"))
    return BreakEven(
        images=cache.missing_images(),
        bytes_per_image=cache.bytes_per_image,
        extract=extract,
        write=write,
        read=read,
        tiled=cache.model.tiling is not None,
    )


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return f"{max(1, seconds):.0f} s"
