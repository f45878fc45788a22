"""Writes a table row by row, and sorts it when it is complete."""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import write_faults, written_aside


class SortedTable:
    """Writes rows into ``path``, each completely or not at all; ``finish`` writes them sorted.

    Three numbers a row are in memory.

    Raises: InputError if the file cannot be written, see fastmsflow.files.write_faults.
    """

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        """``path``: ``.csv`` or ``.jsonl`` (JSON lines)."""
        self.path = path
        self._columns = columns
        self._index: list[tuple[float, int, int]] = []  # rank, first byte, bytes
        with write_faults(path):
            # Unbuffered, so that every written row is in the file at once.
            self._file = path.open("w+b", buffering=0)

    def close(self) -> None:
        """Closes the file, which stays in place."""
        self._file.close()

    def __len__(self) -> int:
        return len(self._index)

    def add(self, row: Mapping[str, Any], rank: float) -> None:
        """Writes a row; None becomes an empty value. ``finish`` writes rows of a higher ``rank`` first."""
        start = self._file.tell()
        with write_faults(self.path):
            try:
                if not self._index:
                    self._write(self._header())
                first = self._file.tell()
                self._write(self._line(row))
            except BaseException:
                self._file.truncate(start)
                self._file.seek(start)
                raise
        self._index.append((rank, first, self._file.tell() - first))

    def finish(self, target: Path) -> None:
        """Writes all rows, highest rank first, into ``target``, by a temporary file that is renamed."""
        with written_aside(target) as aside, aside.open("wb") as file:
            file.write(self._header())
            for _, start, length in sorted(self._index, key=lambda entry: -entry[0]):
                self._file.seek(start)
                file.write(self._file.read(length))

    def _write(self, content: bytes) -> None:
        rest = memoryview(content)
        while rest:
            rest = rest[self._file.write(rest) :]

    def _header(self) -> bytes:
        return _csv(self._columns) if self.path.suffix == ".csv" else b""

    def _line(self, row: Mapping[str, Any]) -> bytes:
        if self.path.suffix == ".csv":
            return _csv(tuple(row[column] for column in self._columns))
        # ASCII: bytes of a file name that are not UTF-8 become surrogates, which os.fsencode turns back.
        return json.dumps({column: row[column] for column in self._columns}).encode("ascii") + b"\n"


def _csv(values: tuple[Any, ...]) -> bytes:
    line = io.StringIO(newline="")
    csv.writer(line).writerow(values)
    return line.getvalue().encode("utf-8", "surrogateescape")
