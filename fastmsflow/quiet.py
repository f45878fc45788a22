"""Silences warnings of some threads and the messages of a logger, and leaves the process's settings as they were."""

import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

# There is one for all, since the filters are the process's.
_LOCK = threading.Lock()


class Kind(NamedTuple):
    """Warnings, as ``warnings.filterwarnings`` describes them."""

    message: str = ""
    """A regular expression that the message begins with."""
    category: type[Warning] = Warning
    module: str = ""
    """A regular expression that the module's name begins with."""


class QuietThread:
    """Silences warnings of ``kinds``, or all, of each thread that is in the block; may be entered again.

    ``warnings.catch_warnings`` puts whole lists of filters into place, so that the blocks of two threads, or of a
    caller's thread and one of ours, could leave the filters of one to the process. Here filters are added to the list
    while any thread is inside, heed the threads that are, and are taken out of it.
    """

    def __init__(self, *kinds: Kind) -> None:
        self._here = threading.local()
        self._inside = 0
        self._filters = [self._filter(kind) for kind in kinds or (Kind(),)]
        self._lists: list[list[Any]] = []

    def __enter__(self) -> None:
        with _LOCK:
            current: list[Any] = warnings.filters  # type: ignore[assignment]
            # Others may have put theirs before.
            if current[: len(self._filters)] != self._filters:
                current[:0] = self._filters
                self._lists.append(current)
            self._inside += 1
        self._here.depth = getattr(self._here, "depth", 0) + 1

    def __exit__(self, *error: object) -> None:
        self._here.depth -= 1
        with _LOCK:
            self._inside -= 1
            if self._inside:
                return
            # The current list may be a copy of one of these.
            for changed in (*self._lists, warnings.filters):
                changed[:] = [entry for entry in changed if entry not in self._filters]  # type: ignore[index]
            self._lists.clear()

    def _filter(self, kind: Kind) -> tuple[Any, ...]:
        message = _MessageHere(re.compile(kind.message, re.IGNORECASE), self._here)
        return ("ignore", message, kind.category, re.compile(kind.module) if kind.module else None, 0)


class _MessageHere:
    """A filter's pattern that no message of another thread matches."""

    def __init__(self, pattern: re.Pattern[str], here: threading.local) -> None:
        self._pattern, self._here = pattern, here

    def match(self, text: str) -> bool:
        return getattr(self._here, "depth", 0) > 0 and self._pattern.match(text) is not None


@contextmanager
def errors_alone(name: str) -> Iterator[None]:
    """Lets the logger ``name`` tell errors alone in the block."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
