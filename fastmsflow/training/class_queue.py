"""Shares out the classes of a set among processes, each with a run of its own; if one fails, the others go on."""

import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

from ..errors import InputError, in_one_line
from ..files import LOCK_FILE, Busy, is_claimed, locked, write_json
from ..schema import read_json_file
from .run_directory import Finished, has_finished

FAILED_FILE = "failed.json"
WAIT_SECONDS = 0.5


class _Failure(TypedDict):
    """The part of a FAILED_FILE that is read."""

    reason: str


def train_each(
    out: Path,
    classes: Sequence[str],
    work: Callable[[str], None],
    failed: Callable[[str, str], None],
    *,
    rank: int = 0,
    size: int = 1,
) -> dict[str, str]:
    """Calls ``work`` for every class whose run in ``out``/CLASS has neither finished nor failed.

    ``size`` processes call this function, and each takes classes that no other one has. The first process returns when
    all classes are done, another one when none is left for it. ``failed``: is called at once with a class of this
    process that fails and the reason; the class's FAILED_FILE holds the traceback.

    Returns: class -> why it failed, from all processes so far.
    """
    reasons: dict[str, str] = {}
    # Each process starts at another class, so that they seldom compete for one.
    start = rank * len(classes) // size
    left = [*classes[start:], *classes[:start]]
    while left:
        before = len(left)
        for name in list(left):
            # A run locks its folder itself, but only after its images have been read.
            with locked(out / f".{name}{LOCK_FILE}") as is_ours:
                if not is_ours or is_claimed(out / name):
                    continue
                try:
                    reason = _attempt(out / name, name, work, failed)
                except Busy:
                    continue
            if reason is not None:
                reasons[name] = reason
            left.remove(name)
        if len(left) == before:
            if rank:
                break
            time.sleep(WAIT_SECONDS)
    return reasons


def _attempt(folder: Path, name: str, work: Callable[[str], None], failed: Callable[[str, str], None]) -> str | None:
    """Returns why the class failed, now or before; None if it did not. Raises: Busy if another process is at work."""
    if has_finished(folder):
        return None
    # One that is damaged counts as none: the class is tried again.
    with suppress(OSError, InputError):
        return read_json_file(folder / FAILED_FILE, _Failure, FAILED_FILE, "remove it")["reason"]
    try:
        work(name)
    except Busy:
        raise
    except Finished:
        return None
    except Exception as error:
        reason = in_one_line(error)
        # On a full disk the record cannot be written either.
        with suppress(InputError):
            write_json(folder / FAILED_FILE, {"reason": reason, "traceback": traceback.format_exception(error)})
        failed(name, reason)
        return reason
    return None
