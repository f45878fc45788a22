"""Measures, before a feature cache is built, whether building it is worth its time."""

import math
import os
import tempfile
import time
from dataclasses import dataclass

import torch

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

    @property
    def build_seconds(self) -> float:
        """The seconds that one process takes to build the whole cache."""
        return self.images * (self.extract + self.write)

    @property
    def first_pass(self) -> int | None:
        """The first pass after which building and reading the cache took no longer than computing the features anew in
        every pass; None if reading takes as long as computing."""
        if self.read >= self.extract:
            return None
        return math.ceil((self.extract + self.write) / (self.extract - self.read))

    def __str__(self) -> str:
        gain = "never pays off here: the disk is slower than the extractor"
        if self.first_pass is not None:
            gain = f"pays off from pass {self.first_pass}"
        size, total = binary(self.bytes_per_image), binary(self.images * self.bytes_per_image)
        return f"cache: {size} an image, {total} in all; building takes about {_duration(self.build_seconds)}; {gain}"


def measure_break_even(cache: FeatureCache) -> BreakEven:
    """Runs ``cache``'s extractor on a few of its images, writes their features onto its disk and reads them again.

    Raises: InputError if an image cannot be read or the disk cannot be written.
    """
    few = range(min(MEASURED_IMAGES, len(cache.images)))
    pooled_features(cache.model, cache.images, few[:1])  # a first call does work that is not repeated
    started = time.perf_counter()
    levels = pooled_features(cache.model, cache.images, few)
    extracted = time.perf_counter()
    content = torch.cat([level.to(cache.dtype).flatten().view(torch.uint8) for level in levels]).numpy().tobytes()
    # The file has no name, so that nothing of it can be left behind.
    with write_faults(cache.folder / "speed"), tempfile.TemporaryFile(dir=cache.folder) as file:
        writing = time.perf_counter()
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter()
        if hasattr(os, "posix_fadvise"):
            # To be read from the disk, not from memory.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        reading = time.perf_counter()
        file.read()
        done = time.perf_counter()
    count = len(few)
    return BreakEven(
        cache.missing_images(),
        cache.bytes_per_image,
        (extracted - started) / count,
        (written - writing) / count,
        (done - reading) / count,
    )


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 else "1 s"
