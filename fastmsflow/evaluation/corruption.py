"""Evaluates checkpoints under the fixed changes of light, beside their results on the images as they are."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ..data.datasets import Progress
from ..data.light import LIGHT_CORRUPTIONS
from ..errors import InputWarning
from ..files import write_json, write_table
from ..inference import AUTO, prepare
from ..scoring import MapKind
from ..visualization.html_report import ReportRow
from .compare_checkpoints import MEAN, CheckpointComparison, CheckpointResult, mean_of
from .corruption_pictures import ChosenMaps, chosen_images, picture
from .evaluate import evaluate_all
from .evaluator import TestResult
from .metric_labels import labeled
from .results import METRICS, Evaluation, mean_evaluation

CLEAN, WORST = "clean", "worst"
WRONG = ("false_alarm_rate", "false_pixel_rate", "pixel_fpr", "pixel_error")
"""Metrics that are worse the higher they are."""
CORRUPTION_FILES = ("corruption.csv", "corruption.json")
"""The names of the files that ``write_corruption`` writes."""


@dataclass(frozen=True)
class CorruptionResult:
    """The metrics of one checkpoint on one class under one change of light."""

    change: str
    """CLEAN, a name of LIGHT_CORRUPTIONS, or MEAN or WORST of these."""
    result: CheckpointResult

    def as_dict(self) -> dict[str, str | float | None]:
        result = self.result.as_dict()
        return {"class": result["class"], "checkpoint": result["checkpoint"], "change": self.change} | result


@dataclass(frozen=True)
class CorruptionReport:
    """The results of the checkpoints on one class under every change of light."""

    rows: list[CorruptionResult] = field(default_factory=list)
    """The rows of one checkpoint after the other, in the order CLEAN, each change, MEAN, WORST."""
    pictures: list[ReportRow] = field(default_factory=list)
    """A good and a defective image with the first checkpoint's heat maps, CLEAN and under each change."""

    def by_checkpoint(self) -> dict[str, dict[str, Mapping[str, float | None]]]:
        """Returns checkpoint -> change -> a metric's label -> value."""
        tables: dict[str, dict[str, Mapping[str, float | None]]] = {}
        for row in self.rows:
            shown = labeled(row.result.evaluation.as_shown())
            tables.setdefault(row.result.checkpoint, {})[row.change] = shown
        return tables


def evaluate_corruptions(
    comparison: CheckpointComparison,
    *,
    folder: Path,
    map_kind: MapKind | None = None,
    workers: int = 0,
    dtype: str = AUTO,
    progress: Progress = lambda done: None,
    stage: Callable[[str, int], None] = lambda label, total: None,
) -> CorruptionReport:
    """Evaluates the checkpoints of ``comparison`` under each of LIGHT_CORRUPTIONS.

    The extractor runs once for each change, whatever the number of checkpoints. Thresholds stay as they are, from
    images under no change. ``folder``: takes the temporary file of heat maps. The others: see ``evaluate_all``.
    """
    images = comparison.images
    with comparison.stopwatch("load"):
        ready = [prepare(model, dtype) for model in comparison.models]
    chosen = chosen_images(images, comparison.test_result.scores)
    evaluations = {CLEAN: [row.evaluation for row in comparison.rows]}
    pictures: list[ReportRow] = []

    def draw(change: str, result: TestResult) -> None:
        light = LIGHT_CORRUPTIONS.get(change)
        pictures.extend(picture(images, number, result, ready[0], change=change, light=light) for number in chosen)

    draw(CLEAN, comparison.test_result)
    for change, light in LIGHT_CORRUPTIONS.items():
        stage(f"scoring {images.name}, {change}", len(images.test))
        with closing(ChosenMaps(folder, chosen)) as maps, warnings.catch_warnings():
            # The images as they are have given the same warnings.
            warnings.simplefilter("ignore", InputWarning)
            results = evaluate_all(
                ready, images, light=light, workers=workers, progress=progress, stopwatch=comparison.stopwatch,
                stage=stage, maps=maps, dtype=None, map_kind=map_kind,
            )  # fmt: skip
            evaluations[change] = [result.evaluation for result in results]
            draw(change, results[0])
    changed = [evaluations[change] for change in LIGHT_CORRUPTIONS]
    evaluations[MEAN] = [mean_evaluation(of_one) for of_one in zip(*changed, strict=True)]
    evaluations[WORST] = [worst_evaluation(of_one) for of_one in zip(*changed, strict=True)]
    rows = [
        CorruptionResult(change, replace(row, evaluation=by_checkpoint[number]))
        for number, row in enumerate(comparison.rows)
        for change, by_checkpoint in evaluations.items()
    ]
    return CorruptionReport(rows, pictures)


def worst_evaluation(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Returns the worst value of each metric that all have: the highest rate of what is wrong, and else the lowest."""
    worst = {}
    for name in (*METRICS, "pixel_error"):
        values = [getattr(each, name) for each in evaluations]
        if None not in values:
            worst[name] = max(values) if name in WRONG else min(values)
    return Evaluation.from_dict(worst)


def mean_over_classes(rows: Sequence[CorruptionResult]) -> list[CorruptionResult]:
    """Returns the mean over all classes for each checkpoint and change, see ``mean_of``."""
    means = {
        change: mean_of([row.result for row in rows if row.change == change])
        for change in dict.fromkeys(row.change for row in rows)
    }
    checkpoints = dict.fromkeys(mean.checkpoint for of_change in means.values() for mean in of_change)
    return [
        CorruptionResult(change, mean)
        for checkpoint in checkpoints
        for change, of_change in means.items()
        for mean in of_change
        if mean.checkpoint == checkpoint
    ]


def write_corruption(out: Path, rows: Sequence[CorruptionResult]) -> None:
    """Writes CORRUPTION_FILES into ``out``: a row for each class, checkpoint and change; JSON has the changes too."""
    table, content = CORRUPTION_FILES
    rows_as_dicts = [row.as_dict() for row in rows]
    write_table(out / table, tuple(rows_as_dicts[0]), (tuple(row.values()) for row in rows_as_dicts))
    changes = {name: asdict(change) for name, change in LIGHT_CORRUPTIONS.items()}
    write_json(out / content, {"changes": changes, "rows": rows_as_dicts})
