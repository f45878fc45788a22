"""What was left out because it could not be read: a file of faults, a JSON line each, to which any process appends."""

import json
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError


class SkippedImages(NamedTuple):
    """Of one run."""

    faults: int
    """Shards and images that are not as they should be, each once."""
    images: int
    """That could not be had, each once. None of a shard whose checksum alone is wrong."""


class ErrorLog:
    """``path``: there or not. What lies behind ``start`` bytes of it is this run's."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.start = self._size()

    def add(self, error: InputError, lost: int, epoch: int, rank: int) -> None:
        """``lost``: how many images go with it. Errors: OSError."""
        line = json.dumps({"fault": str(error), "lost": lost, "epoch": epoch, "rank": rank})
        # One write in append mode, so that workers' and ranks' lines do not mix.
        with self.path.open("a") as file:
            file.write(f"{line}\n")

    def left_out(self) -> SkippedImages:
        """In this run, by all processes: of what every epoch tells again, once."""
        lost: dict[str, int] = {}
        if self._size() > self.start:
            with self.path.open() as file:
                file.seek(self.start)
                for line in map(json.loads, file):
                    lost[line["fault"]] = max(line["lost"], lost.get(line["fault"], 0))
        return SkippedImages(len(lost), sum(lost.values()))

    def _size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0
