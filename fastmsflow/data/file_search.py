"""Finds image files: below folders, by shell patterns, and in lists of names on standard input."""

import errno
import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from ..errors import InputError
from ..files import absolute, shown
from .image_formats import NO_IMAGES, SUFFIXES, suffix_of
from .image_set import ImageSet
from .own_output import OwnFiles, holds_results, own_output, own_output_from_above
from .passed_over import PassedOver
from .shards.shard_set import refuse_shards
from .url_images import is_url

EMPTY_NAME = "a name is empty, as that of a variable that is not set; give a file or a folder, '.' for this one"


def list_images(folder: str | Path) -> list[Path]:
    """Returns all image files below ``folder``, sorted; hidden ones are left out, links to folders are followed.

    Pictures that this product wrote there are left out too. An InputWarning tells of these and of files that look like
    images and are not read. Raises: InputError if there are no images, or a folder cannot be read.
    """
    search = FolderSearch()
    files = search.images(folder)
    search.passed_over.warn()
    return files


def files_of(paths: Iterable[Path]) -> list[Path]:
    """Returns files as they are and all images below folders, each once; the warnings and errors are those of
    ``list_images``."""
    search = FolderSearch()
    files = [file for path in paths for file in (search.images(path) if path.is_dir() else [path])]
    search.passed_over.warn()
    return list(dict.fromkeys(files))


class FolderSearch:
    """Searches folders for images, and keeps account of what is passed over in all of them."""

    def __init__(self) -> None:
        self.passed_over = PassedOver()
        self._searched: set[tuple[int, int]] = set()

    def images(self, folder: str | Path, *, may_be_results: bool = False) -> list[Path]:
        """Returns all image files below ``folder`` as ``list_images`` does, and raises the same errors.

        ``may_be_results``: a folder into which this product wrote may hold no images.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"{shown(folder)}: no such folder")
        files, faults = self.images_and_faults(folder)
        if faults and not (may_be_results and not files and holds_results(folder)):
            raise InputError("; ".join([faults[0], *(() if files else self.passed_over.lines())]))
        return files

    def images_and_faults(self, folder: str | Path) -> tuple[list[Path], list[str]]:
        """Returns the images below ``folder``, sorted, and the faults: a line for each folder that cannot be read, or
        one if there are no images. Every folder is visited once, whatever links lead to it.

        Raises: InputError if there are shards instead.
        """
        faults: list[str] = []
        visited: set[tuple[int, int]] = set()
        files = [image for _, images in self._walk(str(folder), visited, faults) for image in images]
        self._searched |= visited
        if not files and not faults:
            refuse_shards(str(folder))
            faults.append(f"{shown(folder)}: {NO_IMAGES}")
        # Paths are sorted by components, which a NUL separates here: no name has one.
        return [Path(file) for file in sorted(files, key=lambda file: file.replace(os.sep, "\0"))], faults

    def add_elsewhere(self, root: Path, images: ImageSet, remedy: str) -> None:
        """Counts the files below ``root`` that look like images and are not in ``images``, where no search has been.

        ``remedy`` says from where images are read.
        """
        known = {absolute(file) for sample in images.samples for file in (sample.image, *sample.mask_files)}
        for folder, found in self._walk(str(root), set(self._searched), [], is_elsewhere=True):
            for image in found:
                if absolute(image) not in known:
                    self.passed_over.add_elsewhere(image, os.path.relpath(folder, root), remedy)

    def _walk(
        self, start: str, visited: set[tuple[int, int]], faults: list[str], *, is_elsewhere: bool = False
    ) -> Iterator[tuple[str, list[str]]]:
        """Yields each folder that was not ``visited`` with its images.

        Files that are passed over are counted, each once; this product's files only where they would be read, so not
        ``is_elsewhere``.
        """
        own = {_joined(start, name) for name in own_output_from_above(start)}
        # Before Python 3.12, os.walk calls itself for each level of folders.
        waiting = [start]
        while waiting:
            base = waiting.pop()
            try:
                status = os.stat(base)  # noqa: PTH116 - strings, which take a third of the time of paths
                place = status.st_dev, status.st_ino
                if place in visited:
                    continue
                images, others, folders = _scan(base)
            except OSError as error:
                is_forbidden = error.errno in (errno.EACCES, errno.EPERM)
                remedy = "change its mode or leave it out" if is_forbidden else "leave it out"
                faults.append(f"{shown(base)}: this folder cannot be read ({error.strerror}); {remedy}")
                continue
            visited.add(place)
            # Sorted, the first on top: of a folder that two links lead to, the first is taken.
            waiting += [_joined(base, name) for name in sorted(folders, reverse=True)]
            is_new = place not in self._searched
            own |= {_joined(base, name) for name in own_output(base, frozenset((*images, *others)))}
            found: list[str] = []
            for path in (_joined(base, name) for name in images):
                if path not in own:
                    found.append(path)
                elif is_new and not is_elsewhere:
                    self.passed_over.add_own(path)
            for name in others if is_new else ():
                self.passed_over.add(_joined(base, name))
            yield base, found


class ImageFiles:
    """Image files in the order in which they were named, each once, and a line for each name that led to none."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.search = FolderSearch()
        """Knows what was passed over in folders."""
        self.urls: list[str] = []
        """The URLs among the names on standard input."""
        self._files: dict[str, Path] = {}
        self._own = OwnFiles()

    @property
    def files(self) -> list[Path]:
        """The files, without the URLs."""
        return list(self._files.values())

    def add_pattern(self, pattern: str) -> None:
        """Adds a file or a folder; where there is none of that name, what the shell pattern matches (``**``: any
        folders).

        Unlike in a shell, hidden files need a pattern of their own, ``.*`` or the like.
        Raises: InputError if the name is empty, which would be the current folder.
        """
        if not pattern:
            raise InputError(EMPTY_NAME)
        if os.path.lexists(pattern) or not glob.has_magic(pattern):
            self.add(Path(pattern))
            return
        matches = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
        if not matches:
            self.faults.append(f"{shown(pattern)}: no file matches this pattern")
        for match in matches:
            self.add_found(Path(match))

    def add(self, path: Path) -> None:
        """Adds a file, or all image files below a folder. A file is not opened, so it may be missing or no image."""
        files, faults = self.search.images_and_faults(path) if path.is_dir() else ([path], [])
        self.faults += faults
        for file in files:
            self._files.setdefault(absolute(file), file)

    def add_found(self, path: Path) -> None:
        """Adds a file or a folder that a pattern or another program has found, unless this product wrote the file."""
        if str(path) in self._own and not path.is_dir():
            self.search.passed_over.add_own(str(path))
        else:
            self.add(path)


def find_images(names: Sequence[str], stdin: BinaryIO, null: bool = False, urls: bool = False) -> ImageFiles:
    """Finds the image files that ``names`` lead to.

    ``names``: files, folders, patterns, and ``-`` for the files and folders listed on ``stdin``. They stand there one a
    line, or, with ``null``, each before a NUL, so that names with newlines can be listed too. Bytes that are not UTF-8
    stay as they are. ``urls``: URLs may be listed among them. Files that this product wrote are passed over, unless
    ``names`` holds them. An InputWarning tells of these and of files that look like images and are not read. Raises:
    InputError if ``null`` is given without ``-``, or if nothing at all was found.
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
                found.add_found(Path(listed_name))
            elif urls:
                found.urls.append(listed_name)
            else:
                found.faults.append(f"{shown(listed_name)}: a URL; they are for predict --format parquet alone")
    if not found.files and not found.urls:
        raise InputError("; ".join([*found.faults[:1], *found.search.passed_over.lines()]))
    found.search.passed_over.warn()
    return found


def _joined(folder: str, name: str) -> str:
    return os.path.join(folder, name)  # noqa: PTH118


def _scan(folder: str) -> tuple[list[str], list[str], list[str]]:
    """Returns the names of the images, of other and hidden files, and of the folders in ``folder``, without hidden
    folders."""
    images: list[str] = []
    others: list[str] = []
    folders: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            try:
                is_folder = entry.is_dir()
            except OSError as error:
                # A link that leads to itself is no folder; one that cannot be followed is named as one when it is read.
                is_folder = error.errno != errno.ELOOP
            if is_folder:
                folders.append(name)
            elif suffix_of(name) in SUFFIXES and not name.startswith("."):
                images.append(name)
            else:
                others.append(name)
    return images, others, [name for name in folders if not name.startswith(".")]


def _split_names(content: bytes, null: bool) -> list[str]:
    names = content.split(b"\0") if null else [line.removesuffix(b"\r") for line in content.split(b"\n")]
    return [os.fsdecode(name) for name in names if name]
