"""Opens the folder of a run, which one process owns at a time and no other run overwrites."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..evaluation.checkpoint_files import CHECKPOINT_FILES
from ..evaluation.report import REPORT_FILES
from ..files import claimed_folder, shown
from ..owned_files import CURVES, record_files, recorded_files
from ..pixel_calibration import FALSE_PIXELS
from ..schema import read_json_file
from ..settings_diff import changed_settings
from .state_format import check_state

STATE_FILE = "state.ckpt"
SETTINGS_FILE = "state-settings.json"
RESULTS_FILE = "results.json"
CONFIG_FILE = "config.yaml"
NOT_FINITE_FILE = "not_finite.json"
PROFILE_FILE = "profile.json"
RUN_FILES = (
    STATE_FILE, SETTINGS_FILE, CONFIG_FILE, NOT_FINITE_FILE, PROFILE_FILE, CURVES, *CHECKPOINT_FILES.values(),
    *REPORT_FILES, RESULTS_FILE,
)  # fmt: skip
"""The names of all files that a run writes into its folder, loggers' apart."""
VERB = "train"
ELSEWHERE = "choose another folder"


class Finished(InputError):
    """Raised when a run that is to begin or to be resumed has finished already."""


@contextmanager
def open_run_directory(out: Path, resume: bool, settings: Mapping[str, Any]) -> Iterator[Path | None]:
    """Reserves ``out`` for this run within the block, and yields the state that the run resumes from; None: it begins.

    ``settings``: the settings in which a resumed run must agree with those in SETTINGS_FILE.

    Raises: Busy if another run is at work in ``out``; Finished if a run has finished there; InputError if an
    interrupted run is there and ``resume`` is not set, its settings are others, or a file that no run has written
    has the name of one of RUN_FILES.
    """
    with claimed_folder(out):
        state = _find_state(out, resume, settings)
        record_files(out, VERB, dict.fromkeys(RUN_FILES))
        try:
            yield state
        finally:
            # Both files are this run's: ``_find_state`` refuses the configuration of another one.
            if not _has_models(out):
                for name in (SETTINGS_FILE, CONFIG_FILE):
                    (out / name).unlink(missing_ok=True)
                record_files(out, VERB, {})


def finish(out: Path) -> None:
    """Removes the files that only an unfinished run needs."""
    for name in (STATE_FILE, SETTINGS_FILE, NOT_FINITE_FILE):
        (out / name).unlink(missing_ok=True)


def has_finished(out: Path) -> bool:
    """Returns whether a run has finished in ``out``, removal of its state included."""
    return (out / RESULTS_FILE).exists() and not (out / SETTINGS_FILE).exists()


def is_unfinished(out: Path) -> bool:
    """Returns whether a run has begun in ``out`` and has not finished."""
    return (out / SETTINGS_FILE).exists() and not (out / RESULTS_FILE).exists()


def refuse_another(out: Path, settings: Mapping[str, Any]) -> None:
    """Raises: InputError if ``out`` holds a run, finished or interrupted, of other settings."""
    if not (out / RESULTS_FILE).exists():
        if _has_models(out):
            _refuse_changes(out, settings)
        return
    what, remedy = f"{out / RESULTS_FILE}: damaged", "remove the folder, or choose another"
    # The results hold the settings, among other things.
    before = read_json_file(out / RESULTS_FILE, dict[str, Any], what, remedy)
    changes = changed_settings(_completed(before), settings, only_now=True)
    if changes:
        raise InputError(f"{out}: holds a finished run of other settings: {changes}; choose another folder")


def _find_state(out: Path, resume: bool, settings: Mapping[str, Any]) -> Path | None:
    state = out / STATE_FILE
    if (out / RESULTS_FILE).exists():
        if (out / SETTINGS_FILE).exists():
            # The run was killed before it removed them.
            finish(out)
        raise Finished(
            f"{out}: holds a finished run, of which `fastmsflow evaluate` reports; choose another folder, or remove it"
        )
    if not _has_models(out):
        own = {*recorded_files(out, VERB)}
        if (out / SETTINGS_FILE).is_file():
            # A run was killed in its first round; earlier versions wrote no record.
            own |= {SETTINGS_FILE, CONFIG_FILE}
        for name in RUN_FILES:
            if name not in own and os.path.lexists(out / name):
                raise InputError(f"{shown(out / name)}: would be written over; move it, or choose another folder")
        return None
    if not resume:
        raise InputError(f"{out}: holds an interrupted run; go on with it by --resume, or choose another folder")
    _refuse_changes(out, settings)
    if not state.exists():
        # The run was killed in its first round.
        return None
    check_state(state, mapped=True)
    return state


def _has_models(out: Path) -> bool:
    return any((out / name).exists() for name in (STATE_FILE, *CHECKPOINT_FILES.values()))


def _refuse_changes(out: Path, settings: Mapping[str, Any]) -> None:
    """Raises: InputError if the run in ``out`` began with other settings, or its settings are not known."""
    try:
        before = read_json_file(out / SETTINGS_FILE, dict[str, Any], f"{out / SETTINGS_FILE}: damaged", ELSEWHERE)
    except FileNotFoundError as error:
        raise InputError(f"{out}: holds models, but no run to go on with; choose another folder") from error
    changes = changed_settings(_completed(before), settings)
    if changes:
        raise InputError(f"{out}: to be resumed, a run needs the settings that it began with: {changes}")


def _completed(before: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of a run with those that earlier versions did not have yet."""
    recipe = before.get("recipe")
    return {**before, "recipe": {"false_pixels": FALSE_PIXELS, **recipe}} if isinstance(recipe, dict) else before
