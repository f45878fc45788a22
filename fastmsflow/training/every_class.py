"""Training of every class of a set, one after the other or shared out among processes, and a table of all results."""

import copy
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from rich.console import Console
from rich.markup import escape

from ..calibration import Calibration
from ..data import ImageSet, open_image_set
from ..data.class_selection import every_class_of
from ..data.reader_pool import ReaderPool
from ..data.shards.shard_set import is_shard_set
from ..distributed.process_group import ProcessGroup
from ..errors import InputError, InputWarning, UnavailableError, in_one_line
from ..evaluation.compare_checkpoints import (
    METRICS_FILES,
    CheckpointResult,
    checkpoints,
    mean_of,
    write_metrics,
)
from ..evaluation.metric_labels import METRIC_LABELS
from ..evaluation.results import METRICS, Evaluation
from ..files import shown
from ..models.checkpoint import read_config
from ..models.msflow import MSFlow
from ..result_folder import claimed_results
from ..schema import conform, read_json_file
from ..visualization.markdown_table import write_markdown_table
from .class_queue import FAILED_FILE, train_each
from .loggers import check_loggers, close_loggers
from .run_directory import RESULTS_FILE, has_finished, refuse_another
from .train import run_settings, say_if_short
from .trainer import check_precision, warn_if_slow
from .training_job import TrainingJob
from .training_plan import check_data_config, check_tiling, describe_images
from .training_result import TrainingResult

SUMMARY_FILE = "summary.md"
METRICS_SHOWN = ("image_auroc_absolute", "pixel_auroc", "aupro", "f1")


@dataclass(frozen=True, kw_only=True)
class EveryClassResult:
    """Results of the runs of all classes."""

    classes: Sequence[str]
    checkpoints: Mapping[str, list[CheckpointResult]]
    """Class -> the results of its checkpoints, for the classes that did not fail."""
    mean: list[CheckpointResult]
    """The mean over the classes; empty where one failed or has no test images."""
    seconds: Mapping[str, float]
    """Class -> seconds of its training."""
    failures: Mapping[str, str]
    """Class -> why it failed."""
    skipped: int
    """Number of classes that an earlier command had finished."""
    wall_seconds: float
    """Seconds of this command."""

    @property
    def rows(self) -> list[CheckpointResult]:
        """The results of all checkpoints, class by class, without the mean."""
        return [row for rows in self.checkpoints.values() for row in rows]

    def as_table(self, format_metric: Callable[[float | None], str]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Returns the header and the lines of the table of all classes, the mean last."""
        metrics = [m for m in METRICS_SHOWN if any(getattr(row.evaluation, m) is not None for row in self.rows)]
        header = ("class", "checkpoint", *(METRIC_LABELS[name] for name in metrics), "seconds")
        groups = [(name, self.checkpoints.get(name, []), self.seconds.get(name)) for name in self.classes]
        if self.mean:
            groups.append(("mean", self.mean, sum(self.seconds.values()) / len(self.seconds)))
        lines: list[tuple[str, ...]] = []
        for name, results, seconds in groups:
            rows = [(row.checkpoint, *(format_metric(getattr(row.evaluation, m)) for m in metrics)) for row in results]
            # A class without results has a line too.
            rows = rows or [("failed" if name in self.failures else "", *("" for _ in metrics))]
            for i, cells in enumerate(rows):
                lines.append(("" if i else shown(name), *cells, "" if i or seconds is None else f"{seconds:.1f}"))
        return header, lines

    @property
    def summary(self) -> str:
        """One line: how many classes were trained, in what time."""
        wall = f"{self.wall_seconds:.0f} s"
        took = f"; {self.skipped} finished before, the last call took {wall}" if self.skipped else f" in {wall}"
        training = f"{sum(self.seconds.values()):.0f} s of training"
        return f"{len(self.seconds)} of {len(self.classes)} classes, {training}{took}"

    def write(self, out: Path, format_metric: Callable[[float | None], str]) -> None:
        """Writes METRICS_FILES and SUMMARY_FILE into ``out``, in the place of earlier ones.

        Raises: InputError if another process is writing there, or a file that this function has not written has one of
        these names.
        """
        failed = "".join(f"\n- {shown(name)} failed: {reason}" for name, reason in self.failures.items())
        header, lines = self.as_table(format_metric)
        notes = f"{self.summary}\n{failed}"
        with claimed_results(out, "train --class all") as new:
            new.begin([*METRICS_FILES, SUMMARY_FILE])
            if self.rows:
                write_metrics(new.unfinished, [*self.rows, *self.mean])
            title = f"{len(self.classes)} classes"
            write_markdown_table(new.unfinished / SUMMARY_FILE, header, lines, title=title, notes=notes)
            new.finish()


class _Set(TypedDict):
    """The part of a run's results on its images that is read."""

    name: str


class _Round(TypedDict):
    """The part of a round in a run's results that is read, beside its metrics."""

    epoch: int


class _Results(TypedDict):
    """The part of a run's results that is read."""

    images: _Set
    rounds: list[_Round]
    seconds: dict[str, float]


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


def train_every_class(
    job: TrainingJob, group: ProcessGroup, console: Console, on_failure: Callable[[str, str], None]
) -> EveryClassResult | None:
    """Trains a model for each class of ``job.source`` into ``job.out``/CLASS.

    ``group``: the processes that share out the classes, after ``join_apart``; ``console`` shows progress;
    ``on_failure`` is called with a class that fails and the reason. The others go on.

    Returns: the results, in the first process; None in the others.
    Raises: InputError if the settings contradict each other, or the folder of a class holds another run.
    """
    # Errors of the settings concern every class and are raised once.
    check_loggers(job.loggers)
    check_precision(job.recipe)
    check_data_config(job.data, is_shard_set(job.source))
    if group.first:
        warn_if_slow(job.recipe)
    if group.size > 1 and group.first:
        # Runs of several processes print nothing themselves.
        say_if_short(job.recipe, console)
    with ReaderPool(job.data.workers) as readers:
        return _ClassRuns(job, group, console, readers).run(on_failure)


class _ClassRuns:
    """The runs of all classes, as one process sees them."""

    def __init__(self, job: TrainingJob, group: ProcessGroup, console: Console, readers: ReaderPool) -> None:
        self._job, self._group, self._console, self._readers = job, group, console, readers
        self._models = ModelFactory(job.build_model, job.recipe.seed)
        self._started = time.perf_counter()
        self._classes: list[str] = group.broadcast_from_rank0(lambda: every_class_of(job.source))
        # An error is kept, and raised when the class's turn comes.
        self._sets: dict[str, ImageSet | Exception] = {}
        with warnings.catch_warnings():
            if not group.first:
                # All processes open the same sets; the first one warns.
                warnings.simplefilter("ignore", InputWarning)
            for name in self._classes:
                try:
                    self._sets[name] = open_image_set(job.source, name)
                except (InputError, UnavailableError, OSError) as error:
                    self._sets[name] = error

    def run(self, on_failure: Callable[[str, str], None]) -> EveryClassResult | None:
        out, group = self._job.out, self._group
        finished = group.broadcast_from_rank0(self._find_finished)
        group.leave()
        for name in finished if group.first else ():
            self._console.print(escape(f"{shown(name)}: finished, skipped"), style="dim", soft_wrap=True)
        waiting = [name for name in self._classes if name not in finished]
        begun = time.perf_counter()

        def train_class(name: str) -> None:
            line = f"class {self._classes.index(name) + 1} of {len(self._classes)}: {shown(name)}"
            done = waiting.index(name)
            if group.size == 1 and done:
                left = (time.perf_counter() - begun) / done * (len(waiting) - done)
                line += f" (about {left:.0f} s left)"
            self._console.print(escape(line), soft_wrap=True)
            result = self._train(name)
            self._console.print(escape(f"{shown(name)}: {_in_short(result)}"), soft_wrap=True, highlight=False)

        failures = train_each(out, self._classes, train_class, on_failure, rank=group.rank, size=group.size)
        return self._collect(failures, len(finished)) if group.first else None

    def _find_finished(self) -> list[str]:
        """Returns the classes that are finished, and forgets the failures of the others, which are tried again.

        Raises: InputError if a model cannot be built, the settings do not fit a class, or its run has others.
        """
        job, out = self._job, self._job.out
        for name, images in self._sets.items():
            if isinstance(images, ImageSet):
                model = self._models.untouched(job.image_size_for(images))
                check_tiling(model, job.data, of_shards=False)
                recipe = job.recipe_for(images)
                if (out / name).is_dir():
                    description = describe_images(images, job.data)
                    settings = run_settings(model, description, recipe, job.data, started_from=job.started_from)
                    refuse_another(out / name, settings)
        for name in self._sets:
            (out / name / FAILED_FILE).unlink(missing_ok=True)
        return [name for name in self._sets if has_finished(out / name)]

    def _train(self, name: str) -> TrainingResult:
        images = self._sets[name]
        if isinstance(images, Exception):
            raise images
        job = _job_of_class(self._job, name)
        model = self._models.new(job.image_size_for(images))
        # Bars of several processes on one terminal would overwrite each other.
        console = self._console if self._group.size == 1 else Console(quiet=True)
        try:
            return job.run(model, images, console=console, group=ProcessGroup(), readers=self._readers)
        except Exception:
            # A reader may have been killed, which shows in any error.
            self._readers.end()
            raise
        finally:
            close_loggers(job.loggers)

    def _collect(self, failures: dict[str, str], skipped: int) -> EveryClassResult:
        results: dict[str, list[CheckpointResult]] = {}
        seconds: dict[str, float] = {}
        for name in self._classes:
            if name not in failures:
                try:
                    results[name], seconds[name] = _results_of(self._job.out / name)
                except InputError as error:
                    failures[name] = in_one_line(error)
        complete = not failures and all(results.values())
        return EveryClassResult(
            classes=self._classes,
            checkpoints=results,
            mean=mean_of([row for rows in results.values() for row in rows]) if complete else [],
            seconds=seconds,
            failures=failures,
            skipped=skipped,
            wall_seconds=time.perf_counter() - self._started,
        )


def _results_of(folder: Path) -> tuple[list[CheckpointResult], float]:
    """Returns (the rows that ``evaluate`` would give for a finished run, from its own results; its seconds).

    There are no rows if the run had no test images.
    Raises: InputError if the run's files are damaged or missing.
    """
    path = folder / RESULTS_FILE
    what, remedy = f"{path}: damaged or not of these models", "remove the folder"
    try:
        results = read_json_file(path, _Results, what, remedy)
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing; {remedy}") from error
    rounds = {row["epoch"]: row for row in results["rounds"]}
    rows = []
    for how, checkpoint in checkpoints(folder).items():
        config = read_config(checkpoint)
        row = rounds.get(config.get("notes", {}).get("epoch"))
        if row is None:
            raise InputError(f"{what} ({checkpoint.name} is of no round that it has); {remedy}")
        if METRICS[0] not in row:
            continue
        evaluation = Evaluation.from_dict(conform(row, dict[str, float | None], what, remedy))
        described = config.get("calibration")
        calibration = described and Calibration.from_dict(described)
        rows.append(CheckpointResult.of_calibrated(results["images"]["name"], how, evaluation, calibration))
    return rows, sum(results["seconds"].values())


def _job_of_class(job: TrainingJob, name: str) -> TrainingJob:
    """Returns the job of one class, as if the user had asked for that class alone."""
    cache = job.data.feature_cache / name if job.data.feature_cache is not None else None
    options: dict[str, Any] = {"class": name, "out": str(job.out / name), "devices": 1, "nodes": 1}
    options |= {"feature-cache": str(cache)} if cache is not None else {}
    data = replace(job.data, feature_cache=cache)
    return replace(job, category=name, out=job.out / name, data=data, options=job.options | options, resume=True)


def _in_short(result: TrainingResult) -> str:
    metrics = {METRIC_LABELS[name]: getattr(result.last, name, None) for name in METRICS_SHOWN}
    figures = "".join(f", {label} {value:.4f}" for label, value in metrics.items() if value is not None)
    return f"{sum(result.seconds.values()):.1f} s{figures}"
