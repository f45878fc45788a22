"""Evaluates the checkpoints of a run side by side, for one class or many."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from ..calibration import Calibration, PixelThreshold, Threshold, pixel_threshold
from ..data import ImageSet, open_image_set
from ..data.datasets import Progress
from ..errors import InputError, InputWarning
from ..files import write_json, write_table
from ..inference import AUTO
from ..inference.loading import load_model
from ..inference.tiled_models import AS_TRAINED, TileOptions, retile
from ..models.msflow import MSFlow
from ..scoring import MapKind
from .checkpoint_files import CHECKPOINT_FILES
from .evaluate import Stopwatch, evaluate_all
from .evaluator import TestResult
from .metric_labels import labeled
from .results import Evaluation, mean_evaluation
from .score_map_store import ScoreMapStore

MEAN = "mean"
METRICS_FILES = ("metrics.csv", "metrics.json")
"""The names of the files that ``write_metrics`` writes."""


@dataclass(frozen=True)
class CheckpointResult:
    """The metrics of one checkpoint on one class."""

    name: str
    """The class, or MEAN."""
    checkpoint: str
    """The way in which the checkpoint's epoch was chosen, or the name of its file."""
    evaluation: Evaluation
    threshold: Threshold | None = None
    """The threshold at which the evaluation's rates are measured."""
    pixel_threshold: PixelThreshold | None = None
    """The threshold at which its decisions on pixels are judged."""
    kind: str | None = None
    """The kind of defect that is judged apart, against all good images, or MEAN_OF_KINDS; None: all together."""

    @classmethod
    def of_calibrated(
        cls, name: str, checkpoint: str, evaluation: Evaluation, calibration: Calibration | None
    ) -> "CheckpointResult":
        """Returns the result with the thresholds of ``calibration``, those that it has."""
        return cls(name, checkpoint, evaluation, threshold_of(calibration), pixel_threshold(calibration))

    def as_dict(self) -> dict[str, str | float | None]:
        row: dict[str, str | float | None] = {"class": self.name, "checkpoint": self.checkpoint}
        for prefix, kind, threshold in (
            ("threshold", Threshold, self.threshold),
            ("pixel_threshold", PixelThreshold, self.pixel_threshold),
        ):
            row |= {f"{prefix}_{field.name}": getattr(threshold, field.name, None) for field in fields(kind)}
        return row | asdict(self.evaluation)


def by_checkpoint(rows: Sequence[CheckpointResult]) -> dict[str, dict[str, Mapping[str, float | None]]]:
    """Returns checkpoint -> kind of defect -> a metric's label -> value, for rows of kinds."""
    tables: dict[str, dict[str, Mapping[str, float | None]]] = {}
    for row in rows:
        tables.setdefault(row.checkpoint, {})[str(row.kind)] = labeled(row.evaluation.as_shown())
    return tables


@dataclass(frozen=True)
class CheckpointComparison:
    """The results of the checkpoints on one class; ``model`` and ``test_result`` are those of the first row."""

    rows: list[CheckpointResult]
    images: ImageSet
    models: list[MSFlow]
    """The model of each row."""
    test_result: TestResult
    stopwatch: Stopwatch
    kinds: list[CheckpointResult]
    """The results of each row by kind of defect, and their mean, where the set asks for it."""

    @property
    def model(self) -> MSFlow:
        return self.models[0]


def compare_checkpoints(
    path: Path,
    source: str,
    category: str | None,
    *,
    maps: ScoreMapStore,
    map_kind: MapKind | None = None,
    false_alarms: float | None = None,
    false_pixels: float | None = None,
    tiles: TileOptions = AS_TRAINED,
    workers: int = 0,
    dtype: str = AUTO,
    progress: Progress = lambda done: None,
    stage: Callable[[str, int], None] = lambda label, total: None,
) -> CheckpointComparison:
    """Evaluates the checkpoints of the run's folder ``path``, or the checkpoint ``path``, on the images of ``source``.

    ``false_alarms``: the rate for which the threshold is set anew, from the calibration in the checkpoint; None: the
    threshold stays. ``false_pixels``: the same for the threshold of pixels. ``tiles``: see
    fastmsflow.inference.tiled_models.retile. The others: see ``evaluate_all``.

    Raises: InputError if there is no checkpoint, it has no calibration, or one without a threshold for a rate, or the
    map of ``map_kind`` needs a calibration.
    """
    images = open_image_set(source, category)
    with warnings.catch_warnings():
        # The checkpoints of a run would all be told of alike.
        warnings.simplefilter("default", InputWarning)
        loaded = {choice: retile(load_model(checkpoint), tiles) for choice, checkpoint in checkpoints(path).items()}
    models = list(loaded.values())
    for model in models:
        _set_rates(model, path, false_alarms, false_pixels)
    if len({(model.extractor.description, model.image_size, model.pool, model.tiling) for model in models}) > 1:
        raise InputError(f"{path}: its checkpoints are not of one run; evaluate each by its file")
    stopwatch = Stopwatch(next(models[0].parameters()).device)
    stage(f"scoring {images.name}", len(images.test))
    results = evaluate_all(
        models, images, workers=workers, progress=progress, stopwatch=stopwatch, stage=stage, maps=maps, dtype=dtype,
        map_kind=map_kind, by_kind=images.kinds_apart,
    )  # fmt: skip
    rows = [
        CheckpointResult.of_calibrated(images.name, choice, result.evaluation, model.calibration)
        for (choice, model), result in zip(loaded.items(), results, strict=True)
    ]
    kinds = [
        replace(row, evaluation=evaluation, kind=kind)
        for row, result in zip(rows, results, strict=True)
        for kind, evaluation in result.kinds.items()
    ]
    return CheckpointComparison(rows, images, models, results[0], stopwatch, kinds)


def _set_rates(model: MSFlow, path: Path, false_alarms: float | None, false_pixels: float | None) -> None:
    """Sets the rates of the thresholds of a model, those that are given. Raises: InputError if it has none for them."""
    if false_alarms is None and false_pixels is None:
        return
    if model.calibration is None:
        raise InputError(f"{path}: is not calibrated; `fastmsflow calibrate MODEL GOOD_IMAGES` does it")
    if false_alarms is not None:
        model.calibration = replace(model.calibration, false_alarms=false_alarms)
        model.calibration.threshold()
    if false_pixels is not None:
        model.calibration = replace(model.calibration, false_pixels=false_pixels)
        model.calibration.pixel_threshold()


def threshold_of(calibration: Calibration | None) -> Threshold | None:
    """Returns the threshold of a calibration; None if it has too few images."""
    return calibration.threshold() if calibration is not None and calibration.is_enough() else None


def checkpoints(path: Path) -> dict[str, Path]:
    """Returns how each checkpoint's epoch was chosen -> its file, for a run's folder or a single checkpoint.

    Raises: InputError if ``path`` does not exist, or the folder holds no checkpoint.
    """
    if not path.exists():
        raise InputError(f"{path}: not there; give a checkpoint or the folder of a run")
    if not path.is_dir():
        return {path.stem: path}
    files = {choice: path / name for choice, name in CHECKPOINT_FILES.items() if (path / name).is_file()}
    if not files:
        names = ", ".join(CHECKPOINT_FILES.values())
        raise InputError(f"{path}: holds no {names}; give a checkpoint or the folder of a run")
    return files


def mean_of(rows: Sequence[CheckpointResult]) -> list[CheckpointResult]:
    """Returns the mean over all classes for each checkpoint and kind of defect that all have, of the metrics that all
    have."""
    means = []
    classes = len({row.name for row in rows})
    for checkpoint, kind in dict.fromkeys((row.checkpoint, row.kind) for row in rows):
        evaluations = [row.evaluation for row in rows if (row.checkpoint, row.kind) == (checkpoint, kind)]
        if len(evaluations) == classes:
            means.append(CheckpointResult(MEAN, checkpoint, mean_evaluation(evaluations), kind=kind))
    return means


def as_dicts(rows: Sequence[CheckpointResult]) -> list[dict[str, str | float | None]]:
    """Returns the rows of a table; it has a column for the kind of defect if there are kinds."""
    dicts = [row.as_dict() for row in rows]
    if any(row.kind is not None for row in rows):
        return [
            {"class": row.name, "checkpoint": row.checkpoint, "kind": row.kind, **each}
            for row, each in zip(rows, dicts, strict=True)
        ]
    return dicts


def write_metrics(out: Path, rows: Sequence[CheckpointResult]) -> None:
    """Writes METRICS_FILES into ``out``: a row for each class and checkpoint, and each kind of defect judged apart."""
    table, content = METRICS_FILES
    rows_as_dicts = as_dicts(rows)
    write_table(out / table, tuple(rows_as_dicts[0]), (tuple(row.values()) for row in rows_as_dicts))
    write_json(out / content, rows_as_dicts)
