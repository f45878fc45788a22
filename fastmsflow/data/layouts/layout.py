"""The interface that every data layout implements, and the errors that layouts share."""

import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import InputError
from ..image_set import ImageSet, Source


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A way in which images lie in folders, or come with a package.

    Each function takes what a user names as the source: a folder or a sample set's name.
    """

    name: str
    detects: Callable[[Source], bool]
    """Returns whether the source has this layout."""
    classes: Callable[[Source], list[str]]
    """Returns the names of the source's classes, sorted; none if the source is one class itself."""
    open: Callable[[Source, str | None], ImageSet]
    """Returns the images of a class. None stands for the source itself, its default class or its only class. Raises:
    InputError if there is no such class."""


def only_class(source: Source, classes: Sequence[str]) -> str:
    """Returns the one class in ``classes``. Raises: InputError if there are none or several."""
    if not classes:
        raise InputError(f"{source}: holds no classes")
    if len(classes) > 1:
        raise InputError(f"{source}: holds several classes; name one with --class: {', '.join(classes)}")
    return classes[0]


def classes_below(root: Source, folder: str) -> list[str]:
    """Returns the names of the folders in ``root`` that have ``folder``, sorted; hidden ones are left out."""
    return [name for name in folders_in(root) if (Path(root) / name / folder).is_dir()]


def folders_in(root: Source) -> list[str]:
    """Returns the names of the folders in ``root``, sorted, without hidden ones; none where it cannot be read."""
    try:
        # Unlike a path's is_dir, an entry's looks no file up, and a folder may hold a million images.
        with os.scandir(root) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith(".") and _is_folder(entry))
    except OSError:
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # A link may lead to itself.
        return False


def root_and_class(
    source: Source, category: str | None, is_class: Callable[[Path], bool], classes: Callable[[Source], list[str]]
) -> tuple[Path, str]:
    """Returns the folder in which the class lies that a user names, and the class's name.

    ``is_class``: says whether a folder is a class itself; ``classes``: see Layout. Without a name it is the class that
    ``source`` is itself, or the only one in it. Raises: InputError if there is none or there are several.
    """
    root = Path(source)
    if category is None and is_class(root):
        return root.resolve().parent, root.resolve().name
    return root, category or only_class(root, classes(root))


def check_class(source: Source, category: str, classes: Sequence[str], hint: str = "") -> None:
    """Raises: InputError if ``category`` is not among ``classes``; ``hint`` ends the message if no name is close."""
    if category in classes:
        return
    close = difflib.get_close_matches(category, classes, 1)
    hint = f"; did you mean {close[0]}?" if close else hint
    raise InputError(f"{source}: no class {category!r} (there: {', '.join(classes) or 'none'}){hint}")
