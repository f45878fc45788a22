"""A folder of results as Parquet: written by one machine or by a cluster, and gone on with where it stopped.

- ``predictions.json``, first of all: the model, thresholds and dtype that its results are of;
- ``parts/*.parquet``: a row for each image, in the columns of ``arrow.RESULTS`` behind its ``path``. What is written
  there is done: the next start leaves it out.
"""

import io
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
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
from ..files import absolute, as_utf8, claimed_folder, remove_asides, shown, write_faults, write_json, written_aside
from ..settings_diff import changed_settings

FORMAT, EARLIER = "fastmsflow predictions 2", "fastmsflow predictions 1"
RUN, PARTS = "predictions.json", "parts"
ELSEWHERE = "choose another folder"
PATH = "path"
# A Parquet file's end, and its beginning, which is there at once; the length of the footer is between them.
END, SMALLEST = b"PAR1", 12
# Names that this command gives: to its own parts, and to a cluster's, by the run that wrote them.
A_RUN, OWN = re.compile(r"[0-9a-f]{32}"), re.compile(r"(part-\d{6,}|[0-9a-f]{32}_.+)\.parquet")
LARGEST = 2**20
"""Bytes of predictions.json that are read."""
READERS = 16
"""Parts that are read at once: an object store lets each wait."""
# Engines have their own kinds of text.
TYPES = {PATH: pa.large_string(), "fault": pa.large_string(), "defective": pa.bool_()}

_T = TypeVar("_T")


@dataclass(frozen=True)
class RowCounts:
    """Numbers of rows in all parts."""

    rows: int
    faults: int
    """Rows without scores, those of lost images among them."""
    lost: int
    """Images that went with their damaged shard; their rows have no path."""
    defective: int


class PredictionFolder:
    """The folder ``out``, or the URL of one in an object store that Arrow reaches (s3://, gs://).

    Errors, of all methods: InputError, one line, where it cannot be reached, read or written.
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
        """Begins the names of the files that a cluster writes in this run."""
        self._earlier: list[str] = []
        self._before: frozenset[str] = frozenset()

    @property
    def parts(self) -> str:
        """The folder of the rows, as the file system ``files`` calls it."""
        return f"{self._root}/{PARTS}"

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keeps other processes of this machine out, in a with block; an object store has no such lock."""
        if self._local is None:
            yield
            return
        with claimed_folder(self._local):
            remove_asides(self._local / PARTS)
            yield

    def begin(self, setting: dict[str, Any], on_cluster: bool = False) -> None:
        """Begins results of ``setting``, or goes on with them: parts that a killed process left cut off are removed.

        Errors: InputError where the folder holds something else, or results of another setting.
        """
        found = self._json()
        if found is None:
            if self._local is not None and is_shard_set(self.out):
                raise InputError(f"{shown(self.out)}: holds a set of shards; {ELSEWHERE}")
            if self._names():
                raise InputError(f"{shown(self.out)}: holds parts, and no {RUN} that says of what; {ELSEWHERE}")
        elif found.get("format") == EARLIER:
            raise InputError(f"{shown(self.out)}: holds results of an earlier version, in other columns; {ELSEWHERE}")
        elif found.get("format") != FORMAT:
            raise InputError(f"{shown(self.out)}: holds a {RUN} of something else; {ELSEWHERE}")
        else:
            changes = changed_settings(found, setting, only_now=True)
            if changes:
                raise InputError(
                    f"{shown(self.out)}: holds results of another run ({changes}); set that back, or {ELSEWHERE}"
                )
            names = self._names()
            for name, whole in zip(names, _side_by_side(self._is_whole, names), strict=True):
                if not whole:
                    self._delete(name, "it is not whole")
        runs = (found or {}).get("runs")
        self._earlier = [run for run in map(str, runs) if A_RUN.fullmatch(run)] if isinstance(runs, list) else []
        runs = [*self._earlier, self.run] if on_cluster else self._earlier
        content = {"format": FORMAT, **setting, "runs": runs}
        if self._local is not None:
            write_json(self._local / RUN, content)
            with write_faults(self._local / PARTS):
                (self._local / PARTS).mkdir(exist_ok=True)
        else:
            self._put(f"{self._root}/{RUN}", json.dumps(content, indent=2).encode())

    def scored(self) -> pa.ChunkedArray:
        """Returns the paths of all rows that are written."""
        names = self._names()
        self._before = frozenset(names)
        columns = [table[PATH] for table in self._read_all(names, [PATH])]
        return pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.large_string())

    def remaining(self, paths: Sequence[str]) -> list[str]:
        """Returns those of ``paths`` that no row is of, in their order: an anti-join with what is written."""
        scored = self.scored()
        if not len(scored):
            return list(paths)
        names = pa.array(map(as_utf8, paths), pa.large_string())
        waiting = pc.invert(pc.is_in(names, value_set=scored.combine_chunks())).to_pylist()
        return [path for path, waits in zip(paths, waiting, strict=True) if waits]

    def drop_lost(self, shards: Collection[str]) -> None:
        """Drops the rows of images that were lost with one of ``shards``: these are read again, and may be mended."""
        names = self._names()
        for name, table in zip(names, self._read_all(names, [PATH, "fault"]), strict=True):
            lost = [
                path is None and any(fault.startswith(f"{shard}: ") for shard in shards)
                for path, fault in zip(table[PATH].to_pylist(), table["fault"].to_pylist(), strict=True)
            ]
            if all(lost):
                self._delete(name, "it holds nothing but lost images")
            elif any(lost):
                self._write_part(name, self._read(name, None).filter(pc.invert(pa.array(lost))))

    def remove_late(self) -> None:
        """Removes what the cluster of an earlier run, whose driver was killed, wrote after ``scored`` had been asked:
        this run has scored those images."""
        for name in set(self._names()) - self._before:
            if Path(name).name.startswith(tuple(self._earlier)):
                self._delete(name, "it came late")

    def rows_of_this_run(self) -> int:
        """Returns the number of rows that a cluster has written in this run, as far as this machine sees them."""
        names = [name for name in self._names() if Path(name).name.startswith(self.run)]
        return sum(table.num_rows for table in self._read_all(names, ["defective"]))

    def write(self, table: pa.Table) -> None:
        """Writes ``table`` as the next part, whole or not at all."""
        if self._next is None:
            numbers = [Path(name).stem.removeprefix("part-") for name in self._names()]
            self._next = 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)
        self._write_part(f"{self.parts}/part-{self._next:06}.parquet", table)
        self._next += 1

    def _write_part(self, name: str, table: pa.Table) -> None:
        content = io.BytesIO()
        pq.write_table(table, content, compression="zstd")
        if self._local is None:
            self._put(name, content.getvalue())
        else:
            with written_aside(name) as aside:
                aside.write_bytes(content.getbuffer())

    def count_rows(self) -> RowCounts:
        """Counts the rows of all parts."""
        rows = faults = lost = defective = 0
        for table in self._read_all(self._names(), [PATH, "fault", "defective"]):
            rows += table.num_rows
            faults += table.num_rows - table["fault"].null_count
            lost += table[PATH].null_count
            defective += pc.sum(table["defective"]).as_py() or 0
        return RowCounts(rows, faults, lost, defective)

    def faults(self, most: int) -> list[str]:
        """Returns the lines of the first ``most`` images that could not be scored, and of each damaged shard one."""
        return [*islice(self._faults(lost=False), most), *dict.fromkeys(self._faults(lost=True))]

    def _faults(self, lost: bool) -> Iterator[str]:
        for table in self._read_all(self._names(), [PATH, "fault"]):
            for path, fault in zip(table[PATH].to_pylist(), table["fault"].to_pylist(), strict=True):
                if fault is not None and (path is None) == lost:
                    yield fault

    def _names(self) -> list[str]:
        """The files of results, sorted; what a link leads to is not of this folder."""
        if self._local is not None:
            walked = os.walk(self._local / PARTS)
            paths = [Path(folder) / name for folder, _, names in walked for name in names]
            found = [absolute(path) for path in paths if not path.is_symlink()]
        else:
            try:
                listed = self.files.get_file_info(fs.FileSelector(self.parts, recursive=True, allow_not_found=True))
            except OSError as error:
                raise InputError(f"{shown(self.out)}: cannot be read ({error})") from error
            found = [info.path for info in listed if info.type == fs.FileType.File]
        # What is being written aside begins with a dot.
        return sorted(name for name in found if name.endswith(".parquet") and not Path(name).name.startswith("."))

    def _read_all(self, names: Sequence[str], columns: list[str]) -> Iterator[pa.Table]:
        return _side_by_side(partial(self._read, columns=columns), names)

    def _read(self, name: str, columns: list[str] | None) -> pa.Table:
        try:
            with self.files.open_input_file(name) as file:
                table = pq.read_table(file, columns=columns)
            return table.cast(pa.schema([field.with_type(TYPES.get(field.name, field.type)) for field in table.schema]))
        except (OSError, pa.ArrowException) as error:
            why = " ".join(str(error).split())[:200]
            raise InputError(f"{shown(name)}: no results that can be read ({why}); move it elsewhere") from error

    def _is_whole(self, name: str) -> bool:
        """Whether a file ends as Parquet does: what a killed process left does not."""
        try:
            with self.files.open_input_file(name) as file:
                size = file.size()
                file.seek(max(0, size - len(END)))
                return size >= SMALLEST and file.read() == END
        except OSError as error:
            raise InputError(f"{shown(name)}: cannot be read ({error})") from error

    def _delete(self, name: str, why: str) -> None:
        """Errors: InputError for what this command has not written."""
        if not OWN.fullmatch(Path(name).name):
            raise InputError(f"{shown(name)}: {why}, and this command has not written it; move it elsewhere")
        try:
            self.files.delete_file(name)
        except OSError as error:
            raise InputError(f"{shown(name)}: cannot be removed ({error})") from error

    def _put(self, name: str, content: bytes) -> None:
        try:
            with self.files.open_output_stream(name) as file:
                file.write(content)
        except OSError as error:
            raise InputError(f"{shown(name)}: cannot be written ({error})") from error

    def _json(self) -> dict[str, Any] | None:
        """Reads ``predictions.json``: None where there is none, {} where it is no JSON object."""
        name = f"{self._root}/{RUN}"
        try:
            if self.files.get_file_info(name).type == fs.FileType.NotFound:
                return None
            with self.files.open_input_file(name) as file:
                content = json.loads(file.read(LARGEST))
        except OSError as error:
            raise InputError(f"{shown(self.out)}: cannot be read ({error})") from error
        except (ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}


def _side_by_side(ask: Callable[[str], _T], names: Sequence[str]) -> Iterator[_T]:
    """Yields the answers in the names' order, no more than a few ahead of whoever takes them."""
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(names), READERS):
            yield from pool.map(ask, names[start : start + READERS])
