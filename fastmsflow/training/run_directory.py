"""The folder of a run: claimed by one process, and never written over by another run."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..evaluation.checkpoint_files import CHECKPOINT_FILES
from ..files import claimed_folder, write_json
from ..settings_diff import changed_settings

STATE_FILE = "state.ckpt"
SETTINGS_FILE = "state-settings.json"
RESULTS_FILE = "results.json"
CONFIG_FILE = "config.yaml"
NOT_FINITE_FILE = "not_finite.json"


class Finished(InputError):
    """A run that is to begin or to go on has finished."""


@contextmanager
def open_run_directory(out: Path, resume: bool, settings: Mapping[str, Any]) -> Iterator[Path | None]:
    """In the block ``out`` belongs to this run. Yields the state that it goes on from; None: it begins.

    ``settings``: what the run that is gone on with must agree in; ``keep_settings`` wrote that run's.
    Errors: Busy where another run is at work, Finished where one has finished here; InputError where one was here that
    is not to be gone on with, or not with these settings.
    """
    with claimed_folder(out):
        state = _state(out, resume, settings)
        try:
            yield state
        finally:
            # Both are this run's: ``_state`` refuses a configuration of somebody else's.
            if not _begun(out):
                for name in (SETTINGS_FILE, CONFIG_FILE):
                    (out / name).unlink(missing_ok=True)


def keep_settings(out: Path, settings: Mapping[str, Any]) -> None:
    """Before the first model is written."""
    write_json(out / SETTINGS_FILE, settings)


def finish(out: Path) -> None:
    """Removes what only an unfinished run needs."""
    for name in (STATE_FILE, SETTINGS_FILE, NOT_FINITE_FILE):
        (out / name).unlink(missing_ok=True)


def has_finished(out: Path) -> bool:
    """Whether a run did all of its work in ``out``, up to the removal of what only an unfinished one needs."""
    return (out / RESULTS_FILE).exists() and not (out / SETTINGS_FILE).exists()


def refuse_another(out: Path, settings: Mapping[str, Any]) -> None:
    """Errors: InputError where ``out`` holds a run, finished or interrupted, of other settings."""
    if not (out / RESULTS_FILE).exists():
        if _begun(out):
            _compare(out, settings)
        return
    try:
        # The results hold the settings, among other things.
        changes = changed_settings(
            json.loads((out / RESULTS_FILE).read_text(encoding="utf-8")), settings, only_now=True
        )
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{out / RESULTS_FILE}: damaged ({error}); remove the folder, or choose another") from error
    if changes:
        raise InputError(f"{out}: holds a finished run of other settings: {changes}; choose another folder")


def _state(out: Path, resume: bool, settings: Mapping[str, Any]) -> Path | None:
    state, finished = out / STATE_FILE, (out / RESULTS_FILE).exists()
    if finished:
        if (out / SETTINGS_FILE).exists():
            finish(out)  # where it was killed before it did
        raise Finished(
            f"{out}: holds a finished run, of which `fastmsflow evaluate` reports; choose another folder, or remove it"
        )
    if not _begun(out):
        if (out / CONFIG_FILE).exists() and not (out / SETTINGS_FILE).exists():
            raise InputError(f"{out / CONFIG_FILE}: would be written over; move it, or choose another folder")
        return None
    if not resume:
        raise InputError(f"{out}: holds an interrupted run; go on with it by --resume, or choose another folder")
    _compare(out, settings)
    if not state.exists():
        return None  # killed in its first round
    try:
        torch.load(state, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load's are of many kinds
        why = str(error).partition("\n")[0]
        raise InputError(f"{state}: damaged ({why}); remove it to begin the run again") from error
    return state


def _begun(out: Path) -> bool:
    return any((out / name).exists() for name in (STATE_FILE, *CHECKPOINT_FILES.values()))


def _compare(out: Path, settings: Mapping[str, Any]) -> None:
    """Errors: InputError where the run in ``out`` began with other settings, or none are known."""
    try:
        before = json.loads((out / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{out}: holds models, but no run to go on with; choose another folder") from error
    changes = changed_settings(before, settings)
    if changes:
        raise InputError(f"{out}: to be resumed, a run needs the settings that it began with: {changes}")
