"""Names the heat maps that ``predict`` writes into one folder, for images of many folders."""

import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..files import LONGEST_NAME

HEAT_MAP = "_heatmap.png"


def heat_map_names(images: Sequence[Path]) -> list[str]:
    """Names the heat map of each of ``images``, in their order: STEM_heatmap.png.

    Images of one stem have as many of their folders in front as tell them apart, joined by ``_``; those that share a
    folder too keep their suffix. What is still the same gets a number, whatever the order of ``images``. A name has
    printable characters alone and at most LONGEST_NAME bytes, and no two are one to a file system that ignores case, or
    how an accent is composed.
    """
    # Without "..", which names no folder; links are not followed.
    paths = [Path(os.path.abspath(image)) for image in images]  # noqa: PTH100
    same: dict[str, list[int]] = {}
    for i, path in enumerate(paths):
        same.setdefault(_key(_fitted(path.stem)), []).append(i)
    names, free = [""] * len(paths), _FreeNames()
    # Images whose stem is unique come first and keep it.
    for key in sorted(same, key=lambda key: (len(same[key]) > 1, key)):
        group = sorted(same[key], key=paths.__getitem__)
        for i, wanted in zip(group, _told_apart([paths[i] for i in group]), strict=True):
            names[i] = free.take(wanted)
    return names


def _told_apart(paths: Sequence[Path]) -> list[str]:
    """Returns names that differ, for images of one stem: folders before the stem, the suffix after it."""
    if len(paths) == 1:
        return [paths[0].stem]
    # The folders of each image, the innermost first.
    folders = [path.parts[-2:0:-1] for path in paths]
    inside, depth = Counter(folders), 0
    while len({parts[:depth] for parts in inside}) < len(inside):
        depth += 1
    return [
        "_".join([*reversed(parts[:depth]), path.name if inside[parts] > 1 else path.stem])
        for path, parts in zip(paths, folders, strict=True)
    ]


class _FreeNames:
    """Gives out every name once."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        # The next number to try, since a million images may want one name.
        self._copies: dict[str, int] = {}

    def take(self, wanted: str) -> str:
        wanted = _fitted(wanted)
        copy = self._copies.get(_key(wanted), 1)
        while True:
            end = HEAT_MAP if copy == 1 else f"_{copy}{HEAT_MAP}"
            name = _fitted(wanted, end) + end
            copy += 1
            if _key(name) not in self._taken:
                self._taken.add(_key(name))
                self._copies[_key(wanted)] = copy
                return name


def _key(name: str) -> str:
    """Returns the same key for names that some file system takes for the same."""
    return unicodedata.normalize("NFC", name).casefold()


def _fitted(text: str, end: str = HEAT_MAP) -> str:
    """Returns ``text`` in printable characters, cut so that ``end`` fits after it."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else "_" for c in text)
    return text.encode()[: LONGEST_NAME - len(end)].decode(errors="ignore")
