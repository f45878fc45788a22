"""What large folders hold, kept between runs: unchanged ones are looked up instead of listed.

One SQLite file for each tree, in fastmsflow/folders in XDG_CACHE_HOME or ~/.cache; it may be removed at any time. A
folder counts as unchanged while its modification time is the same: every file that is added, removed or renamed in it
changes that. Sizes of files are not kept, as writing into a file leaves its folder's time as it was.
"""

import contextlib
import hashlib
import os
import sqlite3
import time
from pathlib import Path
from typing import NamedTuple

from .image_io import SUFFIXES

# A folder changed again within its clock's tick would show the same time: on FAT that is two seconds.
TICK = 2_000_000_000
SCHEMA = "CREATE TABLE IF NOT EXISTS folder (path BLOB PRIMARY KEY, modified INTEGER, images BLOB, folders BLOB)"


class Listing(NamedTuple):
    """One folder."""

    place: tuple[int, int]
    """Its device and inode: the same for every path that leads to it."""
    images: list[str]
    folders: list[str]
    """Hidden ones are in neither."""


def scan(path: str) -> Listing:
    """The folder as it is. Errors: OSError."""
    return _scan(path, os.stat(path))[0]  # noqa: PTH116 - a Path for each of many folders takes longer than the call


class FolderIndex:
    """The listings of one tree's folders. A file of the index that is damaged or cannot be written costs its use only:
    then folders are listed."""

    def __init__(self, file: Path) -> None:
        self._base = sqlite3.connect(file, timeout=0.2)
        self._base.execute(SCHEMA)

    @classmethod
    def of(cls, root: Path, create: bool = False) -> "FolderIndex | None":
        """The tree's index; None where there is none, or with ``create`` where there can be none."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastmsflow" / "folders"
        # The path as given: listings are kept by it, and its folders by theirs.
        file = cache / f"{hashlib.sha256(os.fsencode(root.absolute())).hexdigest()[:32]}.sqlite"
        # Unlike Path.is_file, False where the cache is another user's.
        if not create and not os.path.isfile(file):  # noqa: PTH113
            return None
        with contextlib.suppress(OSError, sqlite3.OperationalError):
            cache.mkdir(parents=True, exist_ok=True)
            try:
                return cls(file)
            except sqlite3.OperationalError:
                # Busy, or not to be opened: it stays as it is.
                raise
            except sqlite3.DatabaseError:
                file.unlink()
        return None

    def listing(self, path: str) -> Listing:
        """The folder as the index has it, where it has not changed since, else as it is. Errors: OSError."""
        status = os.stat(path)  # noqa: PTH116
        key = os.fsencode(os.path.abspath(path))  # noqa: PTH100 - links stay what they are
        with contextlib.suppress(sqlite3.Error):
            same = "SELECT images, folders FROM folder WHERE path = ? AND modified = ?"
            row = self._base.execute(same, (key, status.st_mtime_ns)).fetchone()
            if row:
                return Listing((status.st_dev, status.st_ino), _names(row[0]), _names(row[1]))
        found, certain = _scan(path, status)
        if certain and time.time_ns() - status.st_mtime_ns > TICK:
            kept = (key, status.st_mtime_ns, _joined(found.images), _joined(found.folders))
            with contextlib.suppress(sqlite3.Error):
                self._base.execute("REPLACE INTO folder VALUES (?, ?, ?, ?)", kept)
        return found

    def close(self) -> None:
        """Keeps what is new."""
        with contextlib.suppress(sqlite3.Error):
            self._base.commit()
        self._base.close()


def _scan(path: str, status: os.stat_result) -> tuple[Listing, bool]:
    """With whether it holds as long as the folder's time does: what a link leads to may change without it."""
    found = Listing((status.st_dev, status.st_ino), [], [])
    certain = True
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            image = os.path.splitext(entry.name)[1].lower() in SUFFIXES  # noqa: PTH122
            folder = entry.is_dir()
            certain &= not entry.is_symlink() or (image and not folder)
            if folder:
                found.folders.append(entry.name)
            elif image:
                found.images.append(entry.name)
    return found, certain


def _joined(names: list[str]) -> bytes:
    return os.fsencode("\0".join(names))


def _names(joined: bytes) -> list[str]:
    return os.fsdecode(joined).split("\0") if joined else []
