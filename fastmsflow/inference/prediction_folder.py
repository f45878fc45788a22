"""A folder of results as Parquet files, written by one machine or by a cluster and continued after an interruption.

- ``predictions.json``, written first: the model, thresholds, dtype and engine of the results;
- ``parts/*.parquet``: a row for each image: its ``path`` and the columns of ``arrow.RESULTS``. The next start leaves
  out the images that have a row.
"""

import io
import json
import os
import re
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from ..data.shards.shard_set import is_shard_set
from ..data.url_images import is_url
from ..errors import InputError
from ..files import absolute, as_utf8, claimed_folder, remove_leftovers, shown, write_faults, written_aside
from ..settings_diff import changed_settings
from .engines import TORCH

FORMAT, EARLIER = "fastmsflow predictions 2", "fastmsflow predictions 1"
RUN, PARTS = "predictions.json", "parts"
ELSEWHERE = "choose another folder"
PATH = "path"
# A Parquet file begins and ends with these bytes; the shortest file has the footer's length between them.
MAGIC, SMALLEST = b"PAR1", 12
# Names of runs, and of files that this command or a cluster has written.
RUN_ID, OWN_FILE = re.compile(r"[0-9a-f]{32}"), re.compile(r"(part-\d{6,}|[0-9a-f]{32}_.+)\.parquet")
MAX_RUN_BYTES = 2**20
"""Largest number of bytes of predictions.json that are read."""
READERS = 16
"""Number of parts that are read at once, since every read from an object store waits."""
FAULTS_SHOWN = 4
# Engines write text in several types.
TYPES = {PATH: pa.large_string(), "fault": pa.large_string(), "defective": pa.bool_()}

_T = TypeVar("_T")


@dataclass(frozen=True)
class RowCounts:
    """Numbers of rows in all parts, and their first faults."""

    rows: int
    faults: int
    """Rows without scores, those of lost images included."""
    lost: int
    """Images that were lost with a damaged shard; their rows have no path."""
    defective: int
    first_faults: list[str]
    """The faults of the first FAULTS_SHOWN images that could not be scored, and one for each damaged shard."""


class PredictionFolder:
    """A folder of results: ``out``, or its URL in an object store that Arrow reaches (s3://, gs://).

    Raises: InputError, from all methods, if the folder cannot be reached, read or written.
    """

    def __init__(self, out: str) -> None:
        self.out = out
        try:
            self.files, root = fs.FileSystem.from_uri(out) if is_url(out) else (fs.LocalFileSystem(), absolute(out))
        except (OSError, ValueError) as error:
            why = f"cannot be reached ({error}); give a folder, or a URL that Arrow knows: s3://, gs://"
            raise InputError(f"{shown(out)}: {why}") from error
        self._root: str = root
        self._local = None if is_url(out) else Path(out)
        self._next: int | None = None
        self.run = uuid4().hex
        """The id of this run, with which the names of a cluster's files begin."""
        self._earlier: list[str] = []
        self._before: frozenset[str] = frozenset()

    @property
    def parts(self) -> str:
        """The path of the folder of rows in the file system ``files``."""
        return f"{self._root}/{PARTS}"

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Locks the folder against other processes of this machine in a with block; an object store has no lock."""
        if self._local is None:
            yield
            return
        with claimed_folder(self._local):
            # Nothing behind a link is removed.
            if not (self._local / PARTS).is_symlink():
                remove_leftovers(self._local / PARTS)
            yield

    def begin(self, settings: dict[str, Any], on_cluster: bool = False) -> None:
        """Begins results of ``settings``, or continues them and removes incomplete parts of a killed process.

        Raises: InputError if the folder holds something else, or results of other settings.
        """
        written = self._json()
        if written is None:
            if self._local is not None and is_shard_set(self.out):
                raise InputError(f"{shown(self.out)}: holds a set of shards; {ELSEWHERE}")
            if self._names():
                raise InputError(f"{shown(self.out)}: holds parts, and no {RUN} that says of what; {ELSEWHERE}")
        elif written.get("format") == EARLIER:
            raise InputError(f"{shown(self.out)}: holds results of an earlier version, in other columns; {ELSEWHERE}")
        elif written.get("format") != FORMAT:
            raise InputError(f"{shown(self.out)}: holds a {RUN} of something else; {ELSEWHERE}")
        else:
            # Earlier versions had no other engine, and did not name it.
            changes = changed_settings({"engine": TORCH, **written}, settings, only_now=True)
            if changes:
                raise InputError(
                    f"{shown(self.out)}: holds results of another run ({changes}); set that back, or {ELSEWHERE}"
                )
            names = self._names()
            for name, whole in zip(names, _map_in_threads(self._is_whole, names), strict=True):
                if not whole:
                    self._delete(name, "it is not whole")
        runs = (written or {}).get("runs")
        self._earlier = [run for run in map(str, runs) if RUN_ID.fullmatch(run)] if isinstance(runs, list) else []
        runs = [*self._earlier, self.run] if on_cluster else self._earlier
        content = json.dumps({"format": FORMAT, **settings, "runs": runs}, indent=2)
        self._write(f"{self._root}/{RUN}", f"{content}\n".encode())
        if self._local is not None:
            with write_faults(self._local / PARTS):
                (self._local / PARTS).mkdir(exist_ok=True)

    def scored(self) -> pa.ChunkedArray:
        """Returns the paths of all rows that are written."""
        names = self._names()
        self._before = frozenset(names)
        chunks = [chunk for table in self._read_all(names, [PATH]) for chunk in table[PATH].chunks]
        return pa.chunked_array(chunks, pa.large_string())

    def remaining(self, paths: Sequence[str]) -> list[str]:
        """Returns those of ``paths`` that have no row, in their order."""
        scored = self.scored()
        if not len(scored):
            return list(paths)
        names = pa.array(map(as_utf8, paths), pa.large_string())
        waiting = pc.invert(pc.is_in(names, value_set=scored.combine_chunks()))
        return list(compress(paths, waiting.to_pylist()))

    def drop_lost(self, shards: Collection[str]) -> None:
        """Removes the rows of images that were lost with one of ``shards``, which may have been repaired since."""
        names = self._names()
        for name, table in zip(names, self._read_all(names, [PATH, "fault"]), strict=True):
            lost = [
                path is None and any((fault or "").startswith(f"{shard}: ") for shard in shards)
                for path, fault in zip(table[PATH].to_pylist(), table["fault"].to_pylist(), strict=True)
            ]
            if all(lost):
                self._delete(name, "it holds nothing but lost images")
            elif any(lost):
                self._write_part(name, self._read(name, None).filter(pc.invert(pa.array(lost))))

    def remove_late(self) -> None:
        """Removes files that the cluster of an earlier, killed run wrote after this run had called ``scored``.

        This run has scored the images of those files itself.
        """
        for name in set(self._names()) - self._before:
            if Path(name).name.startswith(tuple(self._earlier)):
                self._delete(name, "it came late")

    def rows_of_this_run(self) -> int:
        """Returns the number of rows that a cluster has written in this run and this machine sees."""
        names = [name for name in self._names() if Path(name).name.startswith(self.run)]
        return sum(table.num_rows for table in self._read_all(names, ["defective"]))

    def write(self, table: pa.Table) -> None:
        """Writes ``table`` as the next part, completely or not at all."""
        if self._next is None:
            numbers = [Path(name).stem.removeprefix("part-") for name in self._names()]
            self._next = 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)
        self._write_part(f"{self.parts}/part-{self._next:06}.parquet", table)
        self._next += 1

    def _write_part(self, name: str, table: pa.Table) -> None:
        content = io.BytesIO()
        pq.write_table(table, content, compression="zstd")
        self._write(name, content.getbuffer())

    def count_rows(self) -> RowCounts:
        """Counts the rows of all parts."""
        rows = faults = lost = defective = 0
        unscored: list[str] = []
        damaged: dict[str, None] = {}
        for table in self._read_all(self._names(), [PATH, "fault", "defective"]):
            fault, is_lost = table["fault"], pc.is_null(table[PATH])
            rows += table.num_rows
            faults += table.num_rows - fault.null_count
            lost += table[PATH].null_count
            defective += pc.sum(table["defective"]).as_py() or 0
            unscored += fault.filter(pc.invert(is_lost)).drop_null().slice(0, FAULTS_SHOWN - len(unscored)).to_pylist()
            damaged |= dict.fromkeys(fault.filter(is_lost).drop_null().to_pylist())
        return RowCounts(rows, faults, lost, defective, [*unscored, *damaged])

    def _names(self) -> list[str]:
        """Returns the files of results, sorted; links are left out."""
        if self._local is not None:
            walked = os.walk(self._local / PARTS)
            paths = [Path(folder) / name for folder, _, names in walked for name in names]
            # Reading a pipe would wait for ever.
            files = [absolute(path) for path in paths if stat.S_ISREG(path.lstat().st_mode)]
        else:
            with _named_if_refused(self.out, "read"):
                listed = self.files.get_file_info(fs.FileSelector(self.parts, recursive=True, allow_not_found=True))
            files = [info.path for info in listed if info.type == fs.FileType.File]
        # The names of temporary files begin with a dot.
        return sorted(name for name in files if name.endswith(".parquet") and not Path(name).name.startswith("."))

    def _read_all(self, names: Sequence[str], columns: list[str]) -> Iterator[pa.Table]:
        return _map_in_threads(partial(self._read, columns=columns), names)

    def _read(self, name: str, columns: list[str] | None) -> pa.Table:
        try:
            with self.files.open_input_file(name) as file:
                table = pq.read_table(file, columns=columns)
            return table.cast(pa.schema([field.with_type(TYPES.get(field.name, field.type)) for field in table.schema]))
        except (OSError, pa.ArrowException) as error:
            why = " ".join(str(error).split())[:200]
            raise InputError(f"{shown(name)}: no results that can be read ({why}); move it elsewhere") from error

    def _is_whole(self, name: str) -> bool:
        """Returns whether a file ends as Parquet does; files of a killed process do not."""
        with _named_if_refused(name, "read"), self.files.open_input_file(name) as file:
            size = file.size()
            file.seek(max(0, size - len(MAGIC)))
            return size >= SMALLEST and file.read() == MAGIC

    def _delete(self, name: str, why: str) -> None:
        """Deletes a file. Raises: InputError if this command has not written it, or a link leads to it."""
        if self._local is not None and (self._local / PARTS).is_symlink():
            raise InputError(f"{shown(name)}: {why}, and {PARTS} is a link, behind which nothing is removed; remove it")
        if not OWN_FILE.fullmatch(Path(name).name):
            raise InputError(f"{shown(name)}: {why}, and this command has not written it; move it elsewhere")
        with _named_if_refused(name, "removed"):
            self.files.delete_file(name)

    def _write(self, name: str, content: bytes | memoryview) -> None:
        """Writes a file, completely or not at all, as object stores do anyway."""
        if self._local is not None:
            with written_aside(name) as aside:
                aside.write_bytes(content)
            return
        with _named_if_refused(name, "written"), self.files.open_output_stream(name) as file:
            file.write(content)

    def _json(self) -> dict[str, Any] | None:
        """Reads ``predictions.json``; returns None if there is none, {} if it is no file that holds a JSON object."""
        name = f"{self._root}/{RUN}"
        with _named_if_refused(self.out, "read"):
            kind = self.files.get_file_info(name).type
            if kind != fs.FileType.File:
                return None if kind == fs.FileType.NotFound else {}
            with self.files.open_input_file(name) as file:
                content = file.read(MAX_RUN_BYTES)
        try:
            settings = json.loads(content)
        except (ValueError, RecursionError):
            return {}
        return settings if isinstance(settings, dict) else {}


@contextmanager
def _named_if_refused(name: str, done: str) -> Iterator[None]:
    """Turns OSError in the block, in which the file or folder ``name`` is ``done``, into InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{shown(name)}: cannot be {done} ({error})") from error


def _map_in_threads(function: Callable[[str], _T], names: Sequence[str]) -> Iterator[_T]:
    """Yields the results in the order of ``names``, of READERS names ahead at most."""
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(names), READERS):
            yield from pool.map(function, names[start : start + READERS])
