"""A table that is written row by row, and sorted when it is complete."""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ..files import write_faults, written_aside

FORMATS = ("csv", "jsonl")


class SortedTable:
    """Rows go into ``path`` as they come, each whole or not at all; ``finish`` writes them in their order.

    In a with block; the file stays where it is. In memory: two numbers a row. Errors: InputError, see
    fastmsflow.files.write_faults.
    """

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        """``path``: ``.csv`` or ``.jsonl`` (JSON lines)."""
        self.path = path
        self._columns = columns
        self._index: list[tuple[float, int, int]] = []  # rank, first byte, bytes
        with write_faults(path):
            # Unbuffered: what has been written is in the file, and nothing is written later.
            self._file = path.open("w+b", buffering=0)

    def __enter__(self) -> "SortedTable":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._index)

    def add(self, row: Mapping[str, Any], rank: float) -> None:
        """Values of None are empty. ``rank``: higher ones come first in the end."""
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
        """All rows, highest rank first, into ``target``: written aside and renamed."""
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
        # In ASCII; a file name's bytes that are not UTF-8 are the surrogates that os.fsencode takes back.
        return json.dumps({column: row[column] for column in self._columns}).encode("ascii") + b"\n"


def _csv(values: tuple[Any, ...]) -> bytes:
    line = io.StringIO(newline="")
    csv.writer(line).writerow(values)
    return line.getvalue().encode("utf-8", "surrogateescape")
