"""Logs images and shards that were left out because they could not be read."""

import json
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError


class SkippedImages(NamedTuple):
    """The faults of one run, and the images that it lost to them."""

    faults: int
    """The number of shards and images with a fault, each counted once."""
    images: int
    """The number of images that could not be read, each counted once. A shard that only has a wrong checksum loses
    none."""


class ErrorLog:
    """A file to which any process appends a line of JSON for each fault.

    ``path``: the file, which need not exist. ``start``: the length of the file when the run began; what follows is the
    run's.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.start = self._size()

    def add(self, error: InputError, lost: int, epoch: int, rank: int) -> None:
        """Appends a fault that costs ``lost`` images. Raises: OSError if the file cannot be written."""
        line = json.dumps({"fault": str(error), "lost": lost, "epoch": epoch, "rank": rank})
        # One write in append mode, so that workers' and ranks' lines do not mix.
        with self.path.open("a") as file:
            file.write(f"{line}\n")

    def skipped_images(self) -> SkippedImages:
        """Counts the faults of this run, of all processes. A fault that several epochs log counts once."""
        lost: dict[str, int] = {}
        if self._size() > self.start:
            with self.path.open() as file:
                file.seek(self.start)
                for line in map(json.loads, file):
                    lost[line["fault"]] = max(line["lost"], lost.get(line["fault"], 0))
        return SkippedImages(len(lost), sum(lost.values()))

    def _size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0
