"""Images and shards that the tests of predicting score, and how they read what was written."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastmsflow.files import LOCK_FILE
from fastmsflow.owned_files import RECORD_FILE

IMAGES, PER_PART = 18, 4
"""The images of ``noise_images``, and how many of them a shard of ``noise_shards`` holds."""
SIZES = [4, 4, 4, 4, 2]
SCORES = ("score", "log_score", "absolute_score")
Command = Callable[..., tuple[int, str, str]]


def table(part: Path) -> Any:
    from pyarrow import parquet

    # Not by its name: that would be open until the garbage collector comes, and a disk cannot be taken away.
    return parquet.read_table(io.BytesIO(part.read_bytes()))


def rows(out: Path) -> list[dict[str, Any]]:
    """Reads the rows of all parts, in their order."""
    return [row for path in sorted(out.glob("parts/part-*.parquet")) for row in table(path).to_pylist()]


def setting(out: Path) -> dict[str, Any]:
    return json.loads((out / "predictions.json").read_text())


def times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("parts/part-*.parquet")}


def contents(out: Path) -> dict[str, bytes]:
    """All files but those that are locked."""
    files = (path for path in sorted(out.rglob("*")) if path.is_file() and path.name not in (LOCK_FILE, RECORD_FILE))
    return {path.name: path.read_bytes() for path in files}


def table_rows(out: Path) -> list[dict[str, str]]:
    """The rows of ``scores.csv``."""
    with (out / "scores.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))
