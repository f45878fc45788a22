"""Trains every class of a set in a run of its own, shared out among processes; if one fails, the others go on."""

import copy
import json
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from ..calibration import Calibration
from ..errors import InputError, in_one_line
from ..evaluation.compare_checkpoints import CheckpointResult, checkpoints, threshold_of
from ..evaluation.results import METRICS, Evaluation
from ..files import LOCK_FILE, Busy, is_claimed, locked, write_json
from ..models.checkpoint import read_config
from ..models.msflow import MSFlow
from .run_directory import RESULTS_FILE, Finished, has_finished

FAILED_FILE = "failed.json"
WAIT_SECONDS = 0.5


class ModelFactory:
    """Makes models with ``build`` from ``seed``: each image size once, then copies, so that weights are read once."""

    def __init__(self, build: Callable[[tuple[int, int]], MSFlow], seed: int) -> None:
        self._build = build
        self._seed = seed
        self._built: dict[tuple[int, int], tuple[MSFlow, torch.Tensor]] = {}

    def untouched(self, image_size: tuple[int, int]) -> MSFlow:
        """Returns the model that the others are copies of. Raises: the errors of ``build``."""
        if image_size not in self._built:
            torch.manual_seed(self._seed)
            model = self._build(image_size)
            self._built[image_size] = model, torch.get_rng_state()
        return self._built[image_size][0]

    def new(self, image_size: tuple[int, int]) -> MSFlow:
        """Returns a new model, and leaves torch's random state as ``build`` does. Raises: the errors of ``build``."""
        model = copy.deepcopy(self.untouched(image_size))
        torch.manual_seed(self._seed)
        torch.set_rng_state(self._built[image_size][1])
        return model


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
            folder = out / name
            # A run locks its folder itself, but only after its images have been read.
            with locked(out / f".{name}{LOCK_FILE}") as is_ours:
                if not is_ours or is_claimed(folder):
                    continue
                try:
                    reason = None if has_finished(folder) else _reason(folder) or _attempt(folder, name, work, failed)
                except Busy:
                    continue
            if reason is not None:
                reasons[name] = reason
            left.remove(name)
        if left and len(left) == before:
            if rank:
                break
            time.sleep(WAIT_SECONDS)
    return reasons


def _attempt(folder: Path, name: str, work: Callable[[str], None], failed: Callable[[str, str], None]) -> str | None:
    """Returns why the class failed; None if it did not. Raises: Busy if another process is at work on the class."""
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


def forget_failure(folder: Path) -> None:
    """Removes the record of a failure, so that the class is tried again."""
    (folder / FAILED_FILE).unlink(missing_ok=True)


def _reason(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / FAILED_FILE).read_text(encoding="utf-8"))["reason"])
    except OSError:
        return None


def results_of(folder: Path) -> tuple[list[CheckpointResult], float]:
    """Returns (the rows that ``evaluate`` would give for a finished run, from its own results; its seconds).

    There are no rows if the run had no test images.
    Raises: InputError if the run's files are damaged or missing.
    """
    path = folder / RESULTS_FILE
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        rounds = {row["epoch"]: row for row in results["rounds"]}
        rows = []
        for how, checkpoint in checkpoints(folder).items():
            config = read_config(checkpoint)
            row = rounds[config["notes"]["epoch"]]
            if METRICS[0] not in row:
                continue
            evaluation = Evaluation.from_dict(row)
            calibration = config["calibration"] and Calibration.from_dict(config["calibration"])
            rows.append(CheckpointResult(results["images"]["name"], how, evaluation, threshold_of(calibration)))
        return rows, sum(results["seconds"].values())
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged or not of these models ({error!r}); remove the folder") from error
