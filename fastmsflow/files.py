"""Writes files aside, then renames them, so that none is ever half-written; shows files' names in messages."""

import csv
import errno
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import InputError, printable

ASIDE = ".aside-"
LOCK_FILE = ".lock"

# The bytes of a file's name on every usual file system, and of what mkstemp and written_aside add to the name.
LONGEST_NAME = 255
_ADDED = len(ASIDE) + 16


@contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; renames it to ``path`` if the block ends well, else removes it.

    Raises: InputError if the file system does not allow it: see ``write_faults``.
    """
    path = Path(path)
    with write_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        room = LONGEST_NAME - _ADDED - len(os.fsencode(path.suffix))
        prefix = os.fsencode(path.stem)[: max(0, room)].decode(errors="ignore")
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{prefix}{ASIDE}", suffix=path.suffix)
        os.close(handle)
        aside = Path(name)
        try:
            yield aside
            # mkstemp makes private files; a result is as readable as any other new file.
            mask = os.umask(0)
            os.umask(mask)
            aside.chmod(0o666 & ~mask)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


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
def locked(path: Path) -> Iterator[bool]:
    """Yields whether this process alone holds the lock file ``path`` until the block ends; never waits.

    The file stays when the block ends: a process that had opened it would lock a file that is gone, and another one the
    new file of that name. The ``train`` extra is needed.
    Raises: InputError if the file cannot be written: see ``write_faults``.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    # The folder is gone if another process's claim, which left it empty, ended in this very moment.
    with suppress(Timeout), write_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            lock.acquire(timeout=0)
    try:
        yield lock.is_locked
    finally:
        lock.release()


@contextmanager
def claimed_folder(folder: Path) -> Iterator[None]:
    """Claims ``folder`` for this process in the block, and makes it if it is not there.

    Files that a killed process was writing aside are removed first. If the folder was made here and holds nothing but
    the LOCK_FILE in the end, it is removed. The ``train`` extra is needed.
    Raises: Busy if another process is at work; InputError if the folder cannot be written: see ``write_faults``.
    """
    created, path = not folder.exists(), folder / LOCK_FILE
    with locked(path) as is_ours:
        if not is_ours:
            raise Busy(f"{shown(folder)}: another process is writing there; choose another folder, or wait for it")
        try:
            remove_asides(folder)
            yield
        finally:
            if created and list(folder.iterdir()) == [path]:
                # filelock 4 refuses a lock file that was unlinked between its opening and its locking. Where another
                # process makes a new one before the folder is gone, the folder stays. Windows unlinks no open file.
                with suppress(OSError):
                    path.unlink()
                    folder.rmdir()


def is_claimed(folder: Path) -> bool:
    """Tells whether another process is at work in ``folder``, as ``claimed_folder`` would find."""
    path = folder / LOCK_FILE
    if not path.exists():
        return False
    with locked(path) as is_ours:
        return not is_ours


def remove_asides(folder: Path) -> None:
    """Removes files that killed processes were writing aside in ``folder``, which the caller has claimed."""
    # The second kind are safetensors': it writes aside too.
    for pattern in (f".*{ASIDE}*", ".tmp" + "[0-9A-Za-z]" * 6):
        for path in folder.glob(pattern):
            path.unlink()


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
