"""Whether a feature cache is worth its building, measured before it is built."""

import math
import os
import tempfile
import time
from dataclasses import dataclass

import torch

from ..files import write_faults
from .feature_cache import FeatureCache, binary
from .features_in_memory import pooled_features

# Enough for a guess: their features are tens of MiB.
MEASURED = 8


@dataclass(frozen=True)
class BreakEven:
    """What building a cache costs, and what it saves in every pass over the images."""

    images: int
    """Still to be built."""
    bytes_per_image: int
    """On disk."""
    extract: float
    """Seconds an image, reading it included."""
    write: float
    """Seconds an image."""
    read: float
    """Seconds an image."""

    @property
    def build_seconds(self) -> float:
        """Of the whole build, by one process."""
        return self.images * (self.extract + self.write)

    @property
    def first_pass(self) -> int | None:
        """The first pass after which having built and read the cache took no longer than computing the features anew
        in every pass; None: reading takes as long as that."""
        if self.read >= self.extract:
            return None
        return math.ceil((self.extract + self.write) / (self.extract - self.read))

    def __str__(self) -> str:
        gain = "never pays off here: the disk is slower than the extractor"
        if self.first_pass is not None:
            gain = f"pays off from pass {self.first_pass}"
        size, total = binary(self.bytes_per_image), binary(self.images * self.bytes_per_image)
        return f"cache: {size} an image, {total} in all; building takes about {_duration(self.build_seconds)}; {gain}"


def measured(cache: FeatureCache) -> BreakEven:
    """Runs ``cache``'s extractor on a few of its images, writes their features onto its disk and reads them again.

    Errors: InputError where an image cannot be read or the disk not be written.
    """
    few = range(min(MEASURED, len(cache.images)))
    pooled_features(cache.model, cache.images, few[:1])  # what is done once is not counted
    started = time.perf_counter()
    levels = pooled_features(cache.model, cache.images, few)
    extracted = time.perf_counter()
    content = torch.cat([level.to(cache.dtype).flatten().view(torch.uint8) for level in levels]).numpy().tobytes()
    # Without a name: nothing of it can be left behind.
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
