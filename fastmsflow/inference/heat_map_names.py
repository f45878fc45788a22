"""Names the heat maps that ``predict`` writes into one folder, for images of many folders."""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..files import LONGEST_NAME
from ..owned_files import HEAT_MAP


def heat_map_names(images: Sequence[Path], others: Iterable[str] = ()) -> list[str]:
    """Names the heat map of each of ``images``, in their order: STEM_heatmap.png.

    Images of one stem have as many of their folders in front as tell them apart, joined by ``_``; those that share a
    folder too keep their suffix. What is still the same gets a number, whatever the order of ``images``. A name has
    printable characters alone and at most LONGEST_NAME bytes, and no two, nor one of ``others``, are one to a file
    system that ignores case, or how an accent is composed.
    """
    # Without "..", which names no folder; links are not followed.
    paths = [Path(os.path.abspath(image)) for image in images]  # noqa: PTH100
    same: dict[str, list[int]] = {}
    for i, path in enumerate(paths):
        same.setdefault(_key(_fitted(path.stem)), []).append(i)
    # The copies are counted over all images, since a million of them may want one name.
    names, taken, copies = [""] * len(paths), set(map(_key, others)), Counter[str]()
    # Images whose stem is unique come first and keep it.
    for key in sorted(same, key=lambda key: (len(same[key]) > 1, key)):
        group = sorted(same[key], key=paths.__getitem__)
        for i, wanted in zip(group, map(_fitted, _told_apart([paths[i] for i in group])), strict=True):
            while not names[i] or _key(names[i]) in taken:
                copies[_key(wanted)] += 1
                copy = copies[_key(wanted)]
                end = HEAT_MAP if copy == 1 else f"_{copy}{HEAT_MAP}"
                names[i] = _fitted(wanted, end) + end
            taken.add(_key(names[i]))
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


def _key(name: str) -> str:
    """Returns the same key for names that some file system takes for the same."""
    return unicodedata.normalize("NFC", name).casefold()


def _fitted(text: str, end: str = HEAT_MAP) -> str:
    """Returns ``text`` in printable characters, cut so that ``end`` fits after it."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else "_" for c in text)
    return text.encode()[: LONGEST_NAME - len(end)].decode(errors="ignore")
