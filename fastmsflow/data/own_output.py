"""Finds the pictures that this product wrote, so that none of them is taken for an image to learn from or to score."""

import csv
import json
import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from ..files import LOCK_FILE, absolute
from ..owned_files import HEAT_MAP, PICTURES, RECORD_FILE, owned_files
from ..result_folder import UNFINISHED

# Folders of versions that wrote no record are known by files that nothing else writes.
_RUN = ("results.json", "state-settings.json")
_RUN_TOO = ("config.yaml", "last.safetensors", "state.ckpt")
_REPORT = "report.html"
_TABLES = ("scores.csv", "scores.jsonl")
MOST_CHARACTERS = 2**24
"""The length of the longest line of a table that is read: a row of many regions has a few thousand."""
_PREDICTED = ["image", "score", "log_score", "absolute_score"]
_EVALUATED = ["image", "label", "kind", "score"]


def own_output(folder: str, names: Collection[str]) -> frozenset[str]:
    """Returns the files in and below ``folder``, which holds ``names``, that this product wrote, relative to it."""
    own: frozenset[str] = owned_files(Path(folder)) if RECORD_FILE in names else frozenset()
    # A record knows more: files that somebody has changed since are not among its own.
    if any(name in names and name not in own for name in _RUN) and any(name in names for name in _RUN_TOO):
        own |= PICTURES
    for table in _TABLES:
        if table in names and table not in own:
            own |= _pictures_of(Path(folder, table), is_evaluation=_REPORT in names)
    if os.path.basename(folder) == UNFINISHED and any(table in names for table in _TABLES):  # noqa: PTH119
        own |= frozenset(name for name in names if name.endswith(HEAT_MAP))
    return own


def own_output_from_above(folder: str) -> frozenset[str]:
    """Returns the files in and below ``folder`` that the records of the folders above it name, relative to it."""
    below, found = Path(absolute(folder)), set[str]()
    for parent in below.parents:
        if (parent / RECORD_FILE).is_file():
            start = f"{below.relative_to(parent).as_posix()}/"
            found |= {name.removeprefix(start) for name in owned_files(parent) if name.startswith(start)}
    return frozenset(found)


def own_output_by_names(names: Collection[str]) -> frozenset[str]:
    """Returns the files among ``names``, all below a URL, that this product wrote, as their and other names tell."""
    marks = {RECORD_FILE, _REPORT, *_TABLES, *_RUN}
    folders = {folder for folder, _, name in (each.rpartition("/") for each in names) if name in marks}
    folders |= {f"{folder}/{UNFINISHED}" for folder in folders}
    return frozenset(
        each
        for each in names
        for folder, _, name in [each.rpartition("/")]
        if folder in folders and (name.endswith(HEAT_MAP) or name in PICTURES)
    )


def holds_results(folder: str | Path) -> bool:
    """Tells whether ``folder`` is one that this product writes or wrote into."""
    return any(os.path.lexists(os.path.join(folder, name)) for name in (RECORD_FILE, LOCK_FILE, *_RUN))  # noqa: PTH118


class OwnFiles:
    """Tells of single files whether this product wrote them; every folder is looked at once."""

    def __init__(self) -> None:
        self._by_folder: dict[str, frozenset[str]] = {}

    def __contains__(self, file: str) -> bool:
        folder, name = os.path.split(absolute(file))
        if folder not in self._by_folder:
            names: list[str] = []
            with suppress(OSError):
                names = os.listdir(folder)  # noqa: PTH208
            self._by_folder[folder] = own_output(folder, frozenset(names)) | own_output_from_above(folder)
        return name in self._by_folder[folder]


def _pictures_of(table: Path, is_evaluation: bool) -> frozenset[str]:
    """Returns the pictures of which a table of scores tells; none if it is no table of this product."""
    with suppress(OSError, ValueError, csv.Error, RecursionError):
        # Opening a pipe would wait for ever.
        if not table.is_file():
            return frozenset()
        with table.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            # A stranger's table may be one line without end.
            lines = iter(partial(file.readline, MOST_CHARACTERS), "")
            if table.suffix == ".jsonl":
                return frozenset(_heat_maps(map(json.loads, lines)))
            header = next(csv.reader(lines), [])
            if header[: len(_EVALUATED)] == _EVALUATED and is_evaluation:
                return PICTURES
            if header[: len(_PREDICTED)] == _PREDICTED:
                return frozenset(_heat_maps(csv.DictReader(lines, header)))
    return frozenset()


def _heat_maps(rows: Iterator[object]) -> Iterator[str]:
    with suppress(ValueError, csv.Error):  # the last line of a killed command
        for row in rows:
            if not isinstance(row, dict) or not row.keys() >= {*_PREDICTED}:
                return
            name = row.get("heat_map")
            if isinstance(name, str) and name.endswith(HEAT_MAP):
                yield name
