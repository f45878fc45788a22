"""A run's checkpoints judged side by side, one class or many."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..calibration import Calibration, Threshold
from ..data import ImageSet, open_image_set
from ..data.datasets import Progress
from ..errors import InputError
from ..files import write_json, write_table
from ..models.msflow import MSFlow
from ..scoring import MapKind
from .checkpoint_files import CHECKPOINT_FILES
from .evaluate import Stopwatch, evaluate_all
from .evaluator import TestResult
from .results import METRICS, Evaluation
from .score_map_store import ScoreMapStore

MEAN = "mean"
THRESHOLD = ("value", "false_alarms", "low", "high", "images")


@dataclass(frozen=True)
class CheckpointResult:
    """A row of results."""

    name: str
    """The class, or MEAN."""
    checkpoint: str
    """How it was chosen, or its file's name."""
    evaluation: Evaluation
    threshold: Threshold | None = None
    """What its rates are at."""

    def as_dict(self) -> dict[str, str | float | None]:
        row: dict[str, str | float | None] = {"class": self.name, "checkpoint": self.checkpoint}
        found = self.threshold
        row |= {f"threshold_{key}": None if found is None else getattr(found, key) for key in THRESHOLD}
        return row | self.evaluation.as_dict() | {"pixel_error": self.evaluation.pixel_error}


@dataclass(frozen=True)
class CheckpointComparison:
    """What was found of one class; ``model`` and ``test_result`` are of the first row."""

    rows: list[CheckpointResult]
    images: ImageSet
    model: MSFlow
    test_result: TestResult
    stopwatch: Stopwatch


def compare_checkpoints(
    where: Path,
    source: str,
    category: str | None,
    false_alarms: float | None,
    workers: int,
    dtype: str,
    progress: Progress,
    stage: Callable[[str, int], None],
    load: Callable[[Path], MSFlow],
    maps: ScoreMapStore,
    kind: MapKind | None = None,
) -> CheckpointComparison:
    """The checkpoints of a run's folder, or the one that ``where`` is, on the test images of ``source``.

    ``false_alarms``: sets the threshold anew, from what the checkpoint knows of good images. ``dtype``, ``progress``,
    ``stage``: see ``evaluate_all``. ``load``: reads a checkpoint and puts it where it is to compute. ``maps``,
    ``kind``: see ``evaluate_all``.
    Errors: InputError where there is no checkpoint, too few held-out images are behind it for the rate, or the
    map of ``kind`` needs a calibration.
    """
    images = open_image_set(source, category)
    found = {name: load(path) for name, path in checkpoints(where).items()}
    for model in found.values():
        recalibrate(model, false_alarms, where)
    models = list(found.values())
    if len({(model.extractor.name, model.image_size) for model in models}) > 1:
        raise InputError(f"{where}: its checkpoints are not of one run; evaluate each by its file")
    stopwatch = Stopwatch(next(models[0].parameters()).device)
    stage(f"scoring {images.name}", len(images.test))
    results = evaluate_all(
        models, images, workers=workers, progress=progress, stopwatch=stopwatch, stage=stage, maps=maps, dtype=dtype,
        map_kind=kind,
    )  # fmt: skip
    rows = [
        CheckpointResult(images.name, name, result.evaluation, threshold_of(model.calibration))
        for (name, model), result in zip(found.items(), results, strict=True)
    ]
    return CheckpointComparison(rows, images, models[0], results[0], stopwatch)


def threshold_of(calibration: Calibration | None) -> Threshold | None:
    """What it is calibrated for, if it has images enough."""
    return calibration.threshold() if calibration is not None and calibration.is_enough() else None


def checkpoints(where: Path) -> dict[str, Path]:
    """How a checkpoint was chosen -> its file. Errors: InputError where it is not there or the folder holds none."""
    if not where.exists():
        raise InputError(f"{where}: not there; give a checkpoint or the folder of a run")
    if not where.is_dir():
        return {where.stem: where}
    there = {how: where / name for how, name in CHECKPOINT_FILES.items() if (where / name).is_file()}
    if not there:
        names = ", ".join(CHECKPOINT_FILES.values())
        raise InputError(f"{where}: holds no {names}; give a checkpoint or the folder of a run")
    return there


def recalibrate(model: MSFlow, false_alarms: float | None, where: Path) -> None:
    """Errors: InputError where a rate is given and no threshold can be had for it."""
    if false_alarms is None:
        return
    if model.calibration is None:
        raise InputError(f"{where}: is not calibrated; `fastmsflow calibrate MODEL GOOD_IMAGES` does it")
    model.calibration = replace(model.calibration, false_alarms=false_alarms)
    model.calibration.threshold()


def mean_of(rows: Sequence[CheckpointResult]) -> list[CheckpointResult]:
    """For each way of choosing that all classes have, the mean over them, of the metrics that all of them have."""
    means = []
    classes = len({row.name for row in rows})
    for checkpoint in dict.fromkeys(row.checkpoint for row in rows):
        values = [row.evaluation.as_dict() for row in rows if row.checkpoint == checkpoint]
        if len(values) < classes:
            continue
        shared = {name: [value[name] for value in values] for name in METRICS}
        mean = {name: float(np.mean(of)) if None not in of else None for name, of in shared.items()}  # type: ignore[arg-type]
        errors = [row.evaluation.pixel_error for row in rows if row.checkpoint == checkpoint]
        mean["pixel_error"] = None if None in errors else max(error for error in errors if error is not None)
        means.append(CheckpointResult(MEAN, checkpoint, Evaluation(**mean)))  # type: ignore[arg-type]
    return means


def write_metrics(out: Path, rows: Sequence[CheckpointResult]) -> None:
    """``metrics.json`` and ``metrics.csv`` into ``out``: a row for each class and checkpoint."""
    content = [row.as_dict() for row in rows]
    write_json(out / "metrics.json", content)
    write_table(out / "metrics.csv", tuple(content[0]), (tuple(row.values()) for row in content))
