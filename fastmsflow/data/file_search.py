"""Finds image files: below folders, by shell patterns, and in lists of names on standard input."""

import errno
import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from ..errors import InputError
from ..files import absolute, shown
from .image_io import SUFFIXES
from .shards.shard_set import refuse_shards
from .url_images import is_url


def list_images(folder: str | Path) -> list[Path]:
    """Returns all image files below ``folder``, sorted; hidden ones are left out, links to folders are followed.

    Raises: InputError if there are none, or a folder cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{shown(folder)}: no such folder")
    files, faults = _images_below(folder)
    if faults:
        raise InputError(faults[0])
    return files


class ImageFiles:
    """Image files in the order in which they were named, each once, and a line for each name that led to none."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.urls: list[str] = []
        """The URLs among the names on standard input."""
        self._files: dict[str, Path] = {}

    @property
    def files(self) -> list[Path]:
        """The files, without the URLs."""
        return list(self._files.values())

    def add_pattern(self, pattern: str) -> None:
        """Adds a file or a folder; where there is none of that name, what the shell pattern matches (``**``: any
        folders).

        Unlike in a shell, hidden files need a pattern of their own, ``.*`` or the like.
        """
        if os.path.lexists(pattern) or not glob.has_magic(pattern):
            matches = [pattern]
        else:
            matches = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
        if not matches:
            self.faults.append(f"{shown(pattern)}: no file matches this pattern")
        for match in matches:
            self.add(Path(match))

    def add(self, path: Path) -> None:
        """Adds a file, or all image files below a folder. A file is not opened, so it may be missing or no image."""
        files, faults = _images_below(path) if path.is_dir() else ([path], [])
        self.faults += faults
        for file in files:
            self._files.setdefault(absolute(file), file)


def find_images(names: Sequence[str], stdin: BinaryIO, null: bool = False, urls: bool = False) -> ImageFiles:
    """Finds the image files that ``names`` lead to.

    ``names``: files, folders, patterns, and ``-`` for the files and folders listed on ``stdin``. They stand there one a
    line, or, with ``null``, each before a NUL, so that names with newlines can be listed too. Bytes that are not UTF-8
    stay as they are. ``urls``: URLs may be listed among them. Raises: InputError if ``null`` is given without ``-``, or
    if nothing at all was found.
    """
    if null and "-" not in names:
        raise InputError("--null is for names on standard input; give - among IMAGES")
    found = ImageFiles()
    for name in names:
        if name != "-":
            found.add_pattern(name)
            continue
        listed = _split_names(stdin.read(), null)
        if not listed:
            found.faults.append("standard input: holds no names; list one a line")
        for listed_name in listed:
            if not is_url(listed_name):
                found.add(Path(listed_name))
            elif urls:
                found.urls.append(listed_name)
            else:
                found.faults.append(f"{shown(listed_name)}: a URL; they are for predict --format parquet alone")
    if not found.files and not found.urls:
        raise InputError(found.faults[0])
    return found


def _images_below(folder: Path) -> tuple[list[Path], list[str]]:
    """Returns all files below ``folder`` with an image's suffix, sorted, and the faults: a line for each folder that
    cannot be read, or one if there are no images. Every folder is visited once, whatever links lead to it.

    Raises: InputError if there are shards instead."""
    files: list[str] = []
    faults: list[str] = []
    visited: set[tuple[int, int]] = set()
    # Before Python 3.12, os.walk calls itself for each level of folders.
    waiting = [str(folder)]
    while waiting:
        base = waiting.pop()
        try:
            status = os.stat(base)  # noqa: PTH116 - here and below strings, which take a third of the time of paths
            images, folders = _scan(base)
        except OSError as error:
            remedy = "change its mode or leave it out" if error.errno in (errno.EACCES, errno.EPERM) else "leave it out"
            faults.append(f"{shown(base)}: this folder cannot be read ({error.strerror}); {remedy}")
            continue
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        start = os.path.join(base, "")  # noqa: PTH118
        files += [start + name for name in images]
        # Sorted, the first on top: of a folder that two links lead to, the first is taken.
        waiting += [start + name for name in sorted(folders, reverse=True)]
    if not files and not faults:
        refuse_shards(str(folder))
        faults.append(f"{shown(folder)}: holds no images ({', '.join(sorted(SUFFIXES))})")
    # Paths are sorted by components, which a NUL separates here: no name has one.
    return [Path(file) for file in sorted(files, key=lambda file: file.replace(os.sep, "\0"))], faults


def _scan(folder: str) -> tuple[list[str], list[str]]:
    """Returns the names of the images and of the folders in ``folder``, without hidden ones."""
    images: list[str] = []
    folders: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                is_folder = entry.is_dir()
            except OSError as error:
                # A link that leads to itself is no folder; one that cannot be followed is named as one when it is read.
                is_folder = error.errno != errno.ELOOP
            if is_folder:
                folders.append(entry.name)
            elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:  # noqa: PTH122
                images.append(entry.name)
    return images, folders


def _split_names(content: bytes, null: bool) -> list[str]:
    names = content.split(b"\0") if null else [line.removesuffix(b"\r") for line in content.split(b"\n")]
    return [os.fsdecode(name) for name in names if name]
