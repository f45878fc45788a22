"""Writes files aside, then renames them, so that none is ever half-written; shows files' names in messages."""

import csv
import errno
import io
import json
import os
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from .errors import InputError, printable

ASIDE = ".aside"
LOCK_FILE = ".lock"
# A file of this name stands for a lock while it is there, on a disk that has no locks.
HELD = f"{LOCK_FILE}-held"
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
WAIT_SECONDS = 5.0
"""Seconds that a process waits for another one that writes the same file."""

LONGEST_NAME = 255
"""Number of bytes that a file's name may have on every usual file system."""


@contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """Yields the path of a new file, in a hidden folder beside ``path``; renames it to ``path`` if the block ends well.

    One process at a time writes ``path``. The folder, with all that is in it, is removed in the end; if the process is
    killed, the next one that writes ``path`` or claims the folder above does that. A path that is written aside already
    is yielded as it is, and the outer block tells of its faults.

    Raises: Busy if another process is writing ``path``; InputError if the file system does not allow it: see
    ``write_faults``.
    """
    path = Path(path)
    if path.parent.name.endswith(ASIDE) and path.parent.name.startswith(".") and _is_ours(path.parent):
        yield path
        return
    with write_faults(path):
        folder = _aside_of(path)
        if folder.is_symlink() or (folder.exists() and not _is_ours(folder)):
            raise InputError(f"{shown(folder)}: is in the way of writing {shown(path.name)}; move it elsewhere")
        with locked(folder / LOCK_FILE, WAIT_SECONDS, path) as is_ours:
            if not is_ours:
                raise Busy(f"{shown(path)}: another process is writing this file; wait for it, or choose another name")
            _clear(folder)
            try:
                yield folder / path.name
                (folder / path.name).replace(path)
            finally:
                with suppress(OSError):
                    _clear(folder)
                    _remove_empty(folder)
        # A file that stands for a lock was in it.
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def write_faults(path: Path) -> Iterator[None]:
    """Turns file-system errors of the block, which writes ``path``, into InputError: one line with the remedy.

    These are a full or read-only disk, no permission, a name too long, a file in a folder's place or the reverse. Other
    errors go through as they are.
    """
    try:
        yield
    except Exception as error:
        line = None if isinstance(error, InputError) else _write_fault(path, error)
        if line is None:
            raise
        raise InputError(line) from error


def shown(path: str | Path) -> str:
    """Returns a file's name as one printable line: newlines, bytes that are not UTF-8, lone surrogates are escaped."""
    text = os.fspath(path)
    if text.isprintable():
        return text
    # No file has a name with lone surrogates, but a table's text may.
    with suppress(UnicodeEncodeError):
        text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return printable(text)


def file_stamp(path: str | Path) -> tuple[int, int, int] | None:
    """Returns what differs once a file is replaced or written to; None if it is not there."""
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def as_utf8(name: str) -> str:
    """Returns ``name`` as UTF-8, which Parquet takes and a file's name need not be; other bytes become \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def absolute(path: str | Path) -> str:
    """Returns ``path`` from the root on, without dots; links are not resolved."""
    return os.path.abspath(path)  # noqa: PTH100 - Path.resolve follows links


def _write_fault(path: Path, error: Exception) -> str | None:
    file, folder = shown(path), shown(path.parent)
    number = _errno(error)
    if number in (errno.EACCES, errno.EPERM):
        if os.access(path.parent, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
            return f"{file}: no permission to replace this file; change its owner or mode, or choose another folder"
        return f"{folder}: no permission to write into this folder; change its mode or choose another folder"
    if number in (errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY) and path.is_dir():
        return f"{file}: a folder of this name is in the way; remove it or choose another name"
    below_a_file = f"{folder}: is or lies below a file, not a folder; choose another folder"
    return {
        errno.ENOSPC: f"{file}: cannot be written, the disk is full; free some space or choose another folder",
        errno.EDQUOT: f"{file}: cannot be written, the disk quota is used up; free some space or choose another folder",
        errno.EFBIG: f"{file}: too large for the disk or for `ulimit -f`; raise the limit or choose another folder",
        errno.EXDEV: f"{file}: lies on another disk than its folder; choose another folder",
        errno.EROFS: f"{folder}: a read-only disk; choose another folder",
        errno.ENAMETOOLONG: f"{file}: the name is too long; choose a shorter one",
        errno.ENOENT: f"{folder}: no file or folder can be made there; choose another folder",
        errno.ENOTDIR: below_a_file,
        errno.EEXIST: below_a_file,
    }.get(number or 0)


def _errno(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    # safetensors writes in Rust, whose errors carry the number in their text.
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


class Busy(InputError):
    """Reports that another process is at work in a folder."""


@contextmanager
def locked(path: Path, wait: float = 0.0, purpose: Path | None = None) -> Iterator[bool]:
    """Yields whether this process alone holds the lock file ``path`` until the block ends.

    It waits for ``wait`` seconds at most. The file stays when the block ends: a process that had opened it would lock a
    file that is gone, and another one the new file of that name.

    Raises: InputError, which names ``purpose`` or else ``path``, if the file cannot be written: see ``write_faults``.
    """
    from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

    lock: BaseFileLock = FileLock(path, fallback_to_soft=False)
    until = time.monotonic() + wait
    with suppress(Timeout), write_faults(purpose or path):
        while not lock.is_locked:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except FileExistsError:
                # Another process may have removed the folder and made it again meanwhile.
                if path.parent.is_file():
                    raise
            try:
                lock.acquire(timeout=max(0.0, until - time.monotonic()))
            except FileNotFoundError:
                # Another process's claim, which left the folder empty, has ended in this very moment.
                if time.monotonic() >= until:
                    break
            except PermissionError as error:
                if not path.exists():
                    raise
                remedy = "remove it if no process is at work there, or choose another folder"
                raise InputError(f"{shown(path)}: a lock file of another user; {remedy}") from error
            except OSError as error:
                if error.errno not in NO_LOCKS or isinstance(lock, SoftFileLock):
                    raise
                lock = SoftFileLock(path.with_name(HELD))
    try:
        yield lock.is_locked
    finally:
        lock.release()


@contextmanager
def claimed_folder(folder: Path) -> Iterator[None]:
    """Claims ``folder`` for this process in the block, and makes it if it is not there.

    Files that a killed process was writing aside are removed first. If the folder was made here and holds nothing but
    the LOCK_FILE in the end, it is removed.
    Raises: Busy if another process is at work; InputError if the folder cannot be written: see ``write_faults``.
    """
    created, path = not folder.exists(), folder / LOCK_FILE
    with locked(path) as is_ours:
        if not is_ours:
            # The system takes a lock away from a killed process, but not a file that stands for one.
            held = folder / HELD
            lock = f"if none is, remove {shown(held)}" if held.exists() else f"it has locked {shown(path)}"
            raise Busy(
                f"{shown(folder)}: another process is writing there; choose another folder, or wait for it ({lock})"
            )
        try:
            remove_leftovers(folder)
            yield
        finally:
            if created:
                with suppress(OSError):
                    _remove_empty(folder)


def is_claimed(folder: Path) -> bool:
    """Tells whether another process is at work in ``folder``, as ``claimed_folder`` would find."""
    path = folder / LOCK_FILE
    if not path.exists():
        return False
    with locked(path) as is_ours:
        return not is_ours


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes were writing aside in ``folder``, if that is there."""
    for aside in folder.glob(f".*{ASIDE}"):
        if not aside.is_symlink() and _is_ours(aside):
            with locked(aside / LOCK_FILE) as is_ours:
                if is_ours:
                    _clear(aside)
                    _remove_empty(aside)


def aside_folder(path: Path) -> Path:
    """Makes a new hidden folder beside ``path`` for temporary files; the caller, or the next claim, removes it."""
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-", suffix=ASIDE))
    (folder / LOCK_FILE).touch()
    return folder


def _aside_of(path: Path) -> Path:
    """Returns the folder in which ``path`` is written."""
    name = os.fsencode(path.name)
    if len(name) + len(ASIDE) + 1 > LONGEST_NAME:
        digest = f"-{zlib.crc32(name):08x}"
        name = name[: LONGEST_NAME - len(ASIDE) - 1 - len(digest)].decode(errors="ignore").encode() + digest.encode()
    return path.with_name(f".{os.fsdecode(name)}{ASIDE}")


def _is_ours(folder: Path) -> bool:
    """Tells whether ``folder`` is one that ``written_aside`` made: it has a lock file in it, or nothing yet."""
    try:
        names = os.listdir(folder)  # noqa: PTH208
    except NotADirectoryError:
        return False
    except FileNotFoundError:
        return True
    return not names or LOCK_FILE in names


def _clear(folder: Path) -> None:
    """Removes all that is in ``folder`` but for its lock files; follows no link."""
    with os.scandir(folder) as entries:
        for entry in list(entries):
            if entry.name in (LOCK_FILE, HELD):
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)  # noqa: PTH108


def _remove_empty(folder: Path) -> None:
    """Removes ``folder``, whose lock this process holds, if it holds nothing but that.

    filelock 4 refuses a lock file that was unlinked between its opening and its locking. Where another process makes a
    new one before the folder is gone, the folder stays, as it does on Windows, which unlinks no open file.
    """
    if {path.name for path in folder.iterdir()} <= {LOCK_FILE, HELD}:
        (folder / LOCK_FILE).unlink(missing_ok=True)
        folder.rmdir()


class _CheckedFile(io.RawIOBase):
    """A file that takes every write, and keeps the first error."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def write(self, content: Any) -> int:
        if self.error is None:
            try:
                self._file.write(content)
            except OSError as error:
                self.error = error
        return len(content)


@contextmanager
def checked_file(path: Path) -> Iterator[BinaryIO]:
    """Opens ``path`` for a writer in C++, which would end the process if a write failed.

    Raises: OSError, when the block has ended, if one did.
    """
    with path.open("wb") as file:
        checked = _CheckedFile(file)
        yield cast(BinaryIO, checked)
        if checked.error is not None:
            raise checked.error


def write_json(path: str | Path, content: object) -> None:
    """Writes indented JSON, aside and then renamed."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(content, indent=2, default=str) + "\n")


def write_yaml(path: str | Path, content: Mapping[str, Any]) -> None:
    """Writes YAML in the mapping's order, aside and then renamed. The ``train`` extra is needed."""
    import yaml

    with written_aside(path) as aside:
        aside.write_text(yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True), encoding="utf-8")


def write_table(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Writes CSV, aside and then renamed; names that are not UTF-8 keep their bytes."""
    with written_aside(path) as aside, aside.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
