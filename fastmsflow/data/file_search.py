"""Folders -> their image files, sorted."""

import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from ..errors import InputError
from ..files import shown
from .image_io import SUFFIXES
from .index import FolderIndex, Listing, scan

# From so many on, what a folder holds is kept for the next time: listing them takes longer than looking it up.
INDEXED_FROM = 10_000


def list_images(folder: str | Path) -> list[Path]:
    """All image files below ``folder``, sorted, as ``images_below`` finds them.

    Errors: InputError where there are none, or a folder cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{shown(folder)}: no such folder")
    faults: list[str] = []
    files = images_below(folder, faults.append)
    if faults:
        raise InputError(faults[0])
    if not files:
        raise InputError(f"{shown(folder)}: holds no images ({', '.join(sorted(SUFFIXES))})")
    return files


def images_below(folder: Path, fault: Callable[[str], None]) -> list[Path]:
    """All files below ``folder`` with an image's suffix, sorted, hidden ones left out; links to folders are followed,
    every folder once. ``fault`` gets a line for each folder that cannot be read.

    Of a tree of 10,000 images or more an index is kept (``fastmsflow.data.index``), so that the next call lists only
    the folders that have changed.
    """
    index = FolderIndex.of(folder)
    if index is None:
        files = _walk(folder, scan, fault)
        if len(files) < INDEXED_FROM or (index := FolderIndex.of(folder, create=True)) is None:
            return files
        # Once more, into the index: this tree's next start is what the time is spent for.
    with closing(index):
        return _walk(folder, index.listing, fault)


def _walk(folder: Path, listing: Callable[[str], Listing], fault: Callable[[str], None]) -> list[Path]:
    files: list[str] = []
    seen: set[tuple[int, int]] = set()
    waiting = [str(folder)]
    while waiting:
        base = waiting.pop()
        try:
            found = listing(base)
        except OSError as error:
            fault(f"{shown(base)}: this folder cannot be read ({error.strerror}); change its mode or leave it out")
            continue
        if found.place in seen:
            continue
        seen.add(found.place)
        start = os.path.join(base, "")  # noqa: PTH118 - here and below strings, which take a third of the time
        files += [start + name for name in found.images]
        # Sorted, the first on top: of a folder that two links lead to, the first is taken.
        waiting += [start + name for name in sorted(found.folders, reverse=True)]
    # As paths are sorted, part by part: no name has a NUL.
    return [Path(file) for file in sorted(files, key=lambda file: file.replace(os.sep, "\0"))]
