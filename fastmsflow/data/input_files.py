"""What users name -> image files: files, folders, patterns, and lists of names on standard input."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from ..errors import InputError
from ..files import absolute, shown
from .file_search import images_below
from .image_io import SUFFIXES
from .url_images import is_url


class ImageFiles:
    """Image files in the order in which they were named, each once, and a line for each name that led to none."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.urls: list[str] = []
        """Those that were listed."""
        self._files: dict[str, Path] = {}

    @property
    def files(self) -> list[Path]:
        return list(self._files.values())

    def add_pattern(self, pattern: str) -> None:
        """A file or a folder; where there is none of that name, what the shell pattern matches (``**``: any folders).

        Not as a shell does: a pattern's own ``.*`` or the like is needed for hidden files.
        """
        if os.path.lexists(pattern) or not glob.has_magic(pattern):
            self.add(Path(pattern))
            return
        matches = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
        if not matches:
            self.faults.append(f"{shown(pattern)}: no file matches this pattern")
        for match in matches:
            self.add(Path(match))

    def add(self, path: Path) -> None:
        """A file, or all image files below a folder. Whether a file is there and an image, reading it will tell."""
        if not path.is_dir():
            self._files.setdefault(absolute(path), path)
            return
        before = len(self.faults)
        files = images_below(path, self.faults.append)
        if not files and len(self.faults) == before:
            self.faults.append(f"{shown(path)}: holds no images ({', '.join(sorted(SUFFIXES))})")
        for file in files:
            self._files.setdefault(absolute(file), file)


def find_images(names: Sequence[str], stdin: BinaryIO, null: bool = False, urls: bool = False) -> ImageFiles:
    """``names``: files, folders, patterns and ``-``: files and folders listed on ``stdin``, one a line, with ``null``
    each before a NUL, so that names with newlines can be listed too. Bytes that are not UTF-8 stay what they are.
    ``urls``: URLs may be listed among them.

    Errors: InputError where ``null`` is given without ``-``, or nothing at all was found.
    """
    if null and "-" not in names:
        raise InputError("--null is for names on standard input; give - among IMAGES")
    found = ImageFiles()
    for name in names:
        if name != "-":
            found.add_pattern(name)
            continue
        listed = listed_names(stdin.read(), null)
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


def listed_names(content: bytes, null: bool) -> list[str]:
    """One name a line, or with ``null`` one before each NUL; empty ones left out."""
    names = content.split(b"\0") if null else [line.removesuffix(b"\r") for line in content.split(b"\n")]
    return [os.fsdecode(name) for name in names if name]
