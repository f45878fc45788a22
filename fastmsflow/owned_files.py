"""Records which files of a folder this product wrote.

Only these are replaced or removed, and none of them is taken for an image to learn from or to score. The record is a
file in the folder; a file that somebody has changed since is no longer one of them.
"""

import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from .files import write_faults, written_aside

__all__ = ["RECORD_FILE", "owned_files", "record_files", "recorded_files", "recorded_verbs"]

RECORD_FILE = ".fastmsflow.json"
FORMAT = "fastmsflow files 1"
CURVES, HISTOGRAM, GALLERY, CORRUPTIONS = "training.png", "scores.png", "heatmaps.png", "corruptions.png"
PICTURES = frozenset({CURVES, HISTOGRAM, GALLERY, CORRUPTIONS})
HEAT_MAP = "_heatmap.png"
"""The end of a heat map's name."""
# No other picture or kind of file is this product's: a stranger's record may name a user's.
_OWN = re.compile(
    rf"(.*/)?(.*{re.escape(HEAT_MAP)}|{'|'.join(map(re.escape, sorted(PICTURES)))}"
    r"|.*\.(csv|json|jsonl|html|yaml|md|safetensors|ckpt))",
    re.DOTALL,
)
MAX_RECORD_BYTES = 2**28
"""Largest size of a record that is read: enough for a million heat maps."""
MOST_PARTS = 256
"""The depth of the deepest file that is believed: Python looks for a folder's folders by calling itself."""


def owned_files(folder: Path, verb: str | None = None) -> frozenset[str]:
    """Returns the files in or below ``folder`` that ``verb``, or any verb, wrote and that are there as it left them.

    Names are relative to ``folder``, with slashes. There are none if the folder has no record, or a damaged one. Files
    that are reached through a link are left out.
    """
    checked: dict[str, bool] = {}
    return frozenset(
        name
        for name, size in recorded_files(folder, verb).items()
        if _is_reached_without_links(folder, name, checked) and _has_size(folder / name, size)
    )


def recorded_files(folder: Path, verb: str | None = None) -> dict[str, int | None]:
    """Returns the name and, if it is known, the size of each file that ``verb``, or any verb, recorded, in that order.

    The files need not be there.
    """
    return {name: size for name, (by, size) in _read(folder).items() if verb in (None, by)}


def recorded_verbs(folder: Path) -> frozenset[str]:
    """Returns the verbs that recorded files."""
    return frozenset(by for by, _ in _read(folder).values())


def record_files(folder: Path, verb: str, files: Mapping[str, int | None]) -> None:
    """Records that ``verb`` wrote ``files`` in ``folder``, and nothing else that was recorded for it before.

    ``files``: name -> size, by which a changed file is told; None: the file may be written at any time, in any size.
    The folder is to be claimed. A record of no files is removed. Raises: InputError if the disk refuses.
    """
    others = {name: entry for name, entry in _read(folder).items() if entry[0] != verb and name not in files}
    entries = others | {name: (verb, size) for name, size in files.items()}
    path = folder / RECORD_FILE
    if not entries:
        with write_faults(path):
            path.unlink(missing_ok=True)
        return
    with written_aside(path) as aside:
        aside.write_text(json.dumps({"format": FORMAT, "files": entries}))


def _read(folder: Path) -> dict[str, tuple[str, int | None]]:
    """Returns name -> (verb, size or None) of all entries that are well formed."""
    try:
        path = folder / RECORD_FILE
        # A stranger's record may be a pipe, which would never end, or fill the memory.
        if not stat.S_ISREG(path.lstat().st_mode) or path.lstat().st_size > MAX_RECORD_BYTES:
            return {}
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("files"), dict):
        return {}
    return {name: (entry[0], entry[1]) for name, entry in content["files"].items() if _is_valid(name, entry)}


def _is_valid(name: str, entry: object) -> bool:
    if not isinstance(entry, list) or len(entry) != 2:
        return False
    by, size = entry
    path = PurePosixPath(name)
    return (
        isinstance(by, str)
        and (size is None or type(size) is int)
        and 0 < len(path.parts) <= MOST_PARTS
        and str(path) == name
        and not path.is_absolute()
        and ".." not in path.parts
        and "\0" not in name
        and _OWN.fullmatch(name) is not None
    )


def _is_reached_without_links(folder: Path, name: str, checked: dict[str, bool]) -> bool:
    parent = os.path.dirname(name)  # noqa: PTH120 - strings, since there may be a million names
    if not parent:
        return True
    if parent not in checked:
        checked[parent] = _is_reached_without_links(folder, parent, checked) and _is_folder(folder / parent)
    return checked[parent]


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def _has_size(path: Path, size: int | None) -> bool:
    """Tells whether a file, not a link, of this size is there; None: of any size."""
    try:
        status = path.lstat()
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(status.st_mode) and size in (None, status.st_size)
