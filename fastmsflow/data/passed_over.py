"""Counts the files that a search for images passes over, and tells of them in one line of each kind."""

import os
import re
import warnings
from collections import Counter, defaultdict

from ..errors import InputWarning, first_few
from ..files import ASIDE, shown
from .image_formats import SUFFIXES, UNREAD_SUFFIXES, is_image_by_content, suffix_of

MOST_OPENED = 1000
"""The number of files of one suffix into which a search looks: opening a million takes long."""
KINDS_SHOWN = 8
HIDDEN, WITHOUT, NUMBERED = "hidden", "without a suffix", "with a number for a suffix"


class PassedOver:
    """Files that look like images and are not read, and files that this product wrote.

    Files with another suffix are opened only when they are told of, and at most MOST_OPENED of each suffix.
    """

    def __init__(self) -> None:
        self._unread: Counter[str] = Counter()
        self._first = ""
        self._unopened: defaultdict[str, list[str]] = defaultdict(list)
        self._more: set[str] = set()
        self._own: Counter[str] = Counter()
        self._remedy = "save them as PNG, or give them the suffix of their format"

    def add(self, path: str) -> None:
        """Adds a file that is not read, because it is hidden or has no image's suffix."""
        name = os.path.basename(path)  # noqa: PTH119 - here and below strings: there may be a million
        suffix = suffix_of(name)
        if name.startswith("."):
            # Other hidden files are nobody's images.
            if suffix not in SUFFIXES | UNREAD_SUFFIXES or ASIDE in name:
                return
            suffix = HIDDEN
        elif suffix in UNREAD_SUFFIXES:
            self._count(path, suffix)
            return
        elif not suffix:
            suffix = WITHOUT
        elif re.fullmatch(r"\.\d+", suffix):
            suffix = NUMBERED
        waiting = self._unopened[suffix]
        if len(waiting) < MOST_OPENED:
            waiting.append(path)
        else:
            self._more.add(suffix)

    def add_elsewhere(self, path: str, folder: str, remedy: str) -> None:
        """Adds an image that lies in ``folder``, where no images are read; ``remedy`` says where they are."""
        self._count(path, f"in {shown(folder)}")
        self._remedy = remedy

    def add_own(self, path: str) -> None:
        """Adds a file that this product wrote."""
        self._own[os.path.dirname(path) or "."] += 1  # noqa: PTH120

    def lines(self) -> list[str]:
        """Returns a line on images that are not read and one on this product's files, where there are any."""
        at_least = ""
        for suffix, paths in self._unopened.items():
            images = [path for path in paths if is_image_by_content(path)]
            for path in images:
                self._count(path, suffix)
            if images and suffix in self._more:
                at_least = "at least "
        self._unopened.clear()
        lines: list[str] = []
        if self._unread:
            kinds = [f"{count} {kind}" for kind, count in self._unread.most_common()]
            count = _files(self._unread, "looks like an image and is", "look like images and are")
            first = f"the first {shown(self._first)}"
            lines.append(f"{at_least}{count} not read ({first_few(kinds, KINDS_SHOWN)}), {first}; {self._remedy}")
        if self._own:
            folders = [shown(folder) for folder in sorted(self._own)]
            count = _files(self._own, "that fastmsflow wrote is", "that fastmsflow wrote are")
            lines.append(f"{count} passed over, in {first_few(folders)}")
        return lines

    def warn(self) -> None:
        """Gives the lines as an InputWarning each."""
        for line in self.lines():
            warnings.warn(line, InputWarning, stacklevel=3)

    def _count(self, path: str, kind: str) -> None:
        # A folder lists its files in any order.
        self._first = min(self._first or path, path)
        self._unread[kind] += 1


def _files(counts: Counter[str], one: str, several: str) -> str:
    count = counts.total()
    return f"1 file {one}" if count == 1 else f"{count} files {several}"
