"""Every class of a set, a run of its own: shared out among processes; where one fails, the others go on."""

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
    """Models as ``build`` makes them, for an image size, from ``seed``: each size built once, then copied, so that
    weights are read once. The copies are whole: training moves and changes a model as it likes."""

    def __init__(self, build: Callable[[tuple[int, int]], MSFlow], seed: int) -> None:
        self._build = build
        self._seed = seed
        self._made: dict[tuple[int, int], tuple[MSFlow, torch.Tensor]] = {}

    def untouched(self, image_size: tuple[int, int]) -> MSFlow:
        """The one that the others are copies of. Errors: as ``build``'s."""
        if image_size not in self._made:
            torch.manual_seed(self._seed)
            model = self._build(image_size)
            self._made[image_size] = model, torch.get_rng_state()
        return self._made[image_size][0]

    def new(self, image_size: tuple[int, int]) -> MSFlow:
        """Leaves torch's random numbers, too, as they are after ``build``. Errors: as ``build``'s."""
        model = copy.deepcopy(self.untouched(image_size))
        torch.manual_seed(self._seed)
        torch.set_rng_state(self._made[image_size][1])
        return model


def train_each(
    out: Path,
    classes: Sequence[str],
    work: Callable[[str], None],
    failed: Callable[[str, str], None],
    rank: int = 0,
    size: int = 1,
) -> dict[str, str]:
    """``work`` on every class whose run in ``out``/CLASS has neither finished nor failed, by ``size`` processes, each
    of which calls this and takes what no other has. The first one returns when all classes are through, another one
    when none is left for it.

    ``failed``: told at once of a class of this process that fails, and why; what there is to know is kept in its
    FAILED_FILE. -> class -> why it failed, of all processes so far.
    """
    reasons: dict[str, str] = {}
    # Each begins elsewhere, so that they seldom look at the same.
    start = rank * len(classes) // size
    left = [*classes[start:], *classes[:start]]
    while left:
        before = len(left)
        for name in list(left):
            folder = out / name
            # A run claims its folder itself, but not before its images are read, and against everybody.
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
    """-> why it failed, if it did. Errors: Busy."""
    try:
        work(name)
    except Busy:
        raise
    except Finished:
        return None
    except Exception as error:
        reason = in_one_line(error)
        # A full disk takes no record either.
        with suppress(InputError):
            write_json(folder / FAILED_FILE, {"reason": reason, "traceback": traceback.format_exception(error)})
        failed(name, reason)
        return reason
    return None


def forget_failure(folder: Path) -> None:
    """So that the class is tried again."""
    (folder / FAILED_FILE).unlink(missing_ok=True)


def _reason(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / FAILED_FILE).read_text(encoding="utf-8"))["reason"])
    except OSError:
        return None


def results_of(folder: Path) -> tuple[list[CheckpointResult], float]:
    """-> (the rows that ``evaluate`` would give of a finished run, from what it measured itself; its wall time, in
    seconds). No rows where the run had no test images.

    Errors: InputError where its files are damaged or gone.
    """
    path = folder / RESULTS_FILE
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        rounds = {moment["epoch"]: moment for moment in results["rounds"]}
        rows = []
        for how, checkpoint in checkpoints(folder).items():
            config = read_config(checkpoint)
            moment = rounds[config["notes"]["epoch"]]
            if METRICS[0] not in moment:
                continue
            evaluation = Evaluation.from_dict(moment)
            calibration = config["calibration"] and Calibration.from_dict(config["calibration"])
            rows.append(CheckpointResult(results["images"]["name"], how, evaluation, threshold_of(calibration)))
        return rows, sum(results["seconds"].values())
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged or not of these models ({error!r}); remove the folder") from error
