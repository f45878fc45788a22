"""Training of every class of a set, one after the other or shared out among processes, and a table of all results."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from ..data import ImageSet, open_image_set
from ..data.class_selection import every_class_of
from ..data.reader_pool import ReaderPool
from ..data.shards.shard_set import is_shard_set
from ..distributed.process_group import ProcessGroup
from ..errors import InputError, UnavailableError, in_one_line
from ..evaluation.compare_checkpoints import CheckpointResult, mean_of, write_metrics
from ..evaluation.metric_labels import METRIC_LABELS
from ..files import shown
from ..visualization.markdown_table import write_markdown_table
from .loggers import check_loggers, close_loggers
from .multi_class import ModelFactory, forget_failure, results_of, train_each
from .run_directory import has_finished, refuse_another
from .train import run_settings, say_if_short
from .trainer import check_precision
from .training_job import TrainingJob
from .training_plan import check_data_config, describe_images
from .training_result import TrainingResult

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
        rows = self.rows
        metrics = [name for name in METRICS_SHOWN if any(getattr(row.evaluation, name) is not None for row in rows)]
        header = ("class", "checkpoint", *(METRIC_LABELS[name] for name in metrics), "seconds")
        lines: list[tuple[str, ...]] = []

        def add(label: str, results: Sequence[CheckpointResult], seconds: str) -> None:
            for i, row in enumerate(results):
                cells = (format_metric(getattr(row.evaluation, name)) for name in metrics)
                lines.append(("" if i else label, row.checkpoint, *cells, "" if i else seconds))

        for name in self.classes:
            seconds = f"{self.seconds[name]:.1f}" if name in self.seconds else ""
            if self.checkpoints.get(name):
                add(shown(name), self.checkpoints[name], seconds)
            else:
                status = "failed" if name in self.failures else ""
                lines.append((shown(name), status, *("" for _ in metrics), seconds))
        if self.mean:
            add("mean", self.mean, f"{sum(self.seconds.values()) / len(self.seconds):.1f}")
        return header, lines

    @property
    def summary(self) -> str:
        """One line: how many classes were trained, in what time."""
        wall = f"{self.wall_seconds:.0f} s"
        took = f"; {self.skipped} finished before, the last call took {wall}" if self.skipped else f" in {wall}"
        training = f"{sum(self.seconds.values()):.0f} s of training"
        return f"{len(self.seconds)} of {len(self.classes)} classes, {training}{took}"

    def write(self, out: Path, format_metric: Callable[[float | None], str]) -> None:
        """Writes ``metrics.json``, ``metrics.csv`` and ``summary.md`` into ``out``."""
        if self.rows:
            write_metrics(out, [*self.rows, *self.mean])
        failed = "".join(f"\n- {shown(name)} failed: {reason}" for name, reason in self.failures.items())
        header, lines = self.as_table(format_metric)
        notes = f"{self.summary}\n{failed}"
        write_markdown_table(out / "summary.md", f"{len(self.classes)} classes", header, lines, notes)


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
    if group.size > 1 and group.first:
        # Runs of several processes print nothing themselves.
        say_if_short(job.recipe, console)
    models = ModelFactory(job.build_model, job.recipe.seed)
    with ReaderPool(job.data.workers) as readers:
        return _ClassRuns(job, group, console, models, readers).run(on_failure)


class _ClassRuns:
    """The runs of all classes, as one process sees them."""

    def __init__(
        self, job: TrainingJob, group: ProcessGroup, console: Console, models: ModelFactory, readers: ReaderPool
    ) -> None:
        self._job, self._group, self._console = job, group, console
        self._models, self._readers = models, readers
        self._started = time.perf_counter()
        self._classes: list[str] = group.broadcast_from_rank0(lambda: every_class_of(job.source))
        self._sets = _open_sets(job.source, self._classes)
        self._sizes = {
            name: job.image_size_for(images) for name, images in self._sets.items() if isinstance(images, ImageSet)
        }

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
            line = f"{shown(name)}: {_in_short(result)}"
            self._console.print(escape(line), soft_wrap=True, highlight=False)

        failures = train_each(out, self._classes, train_class, on_failure, rank=group.rank, size=group.size)
        return self._collect(failures, len(finished)) if group.first else None

    def _find_finished(self) -> list[str]:
        """Returns the classes that are finished, and forgets the failures of the others, which are tried again.

        Raises: InputError if a model cannot be built, or the run of a class has other settings.
        """
        for size in dict.fromkeys(self._sizes.values()):
            self._models.untouched(size)
        job, out = self._job, self._job.out
        for name, images in self._sets.items():
            if isinstance(images, ImageSet) and (out / name).is_dir():
                model = self._models.untouched(self._sizes[name])
                description = describe_images(images, job.data)
                settings = run_settings(model, description, job.recipe, job.data, started_from=job.started_from)
                refuse_another(out / name, settings)
        for name in self._sets:
            forget_failure(out / name)
        return [name for name in self._sets if has_finished(out / name)]

    def _train(self, name: str) -> TrainingResult:
        images = self._sets[name]
        if isinstance(images, Exception):
            raise images
        job = _job_of_class(self._job, name)
        model = self._models.new(self._sizes[name])
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
        checkpoints: dict[str, list[CheckpointResult]] = {}
        seconds: dict[str, float] = {}
        for name in self._classes:
            if name in failures:
                continue
            try:
                checkpoints[name], seconds[name] = results_of(self._job.out / name)
            except InputError as error:
                failures[name] = in_one_line(error)
        complete = not failures and all(checkpoints.values())
        rows = [row for rows in checkpoints.values() for row in rows]
        return EveryClassResult(
            classes=self._classes,
            checkpoints=checkpoints,
            mean=mean_of(rows) if complete else [],
            seconds=seconds,
            failures=failures,
            skipped=skipped,
            wall_seconds=time.perf_counter() - self._started,
        )


def _open_sets(source: str, classes: Sequence[str]) -> dict[str, ImageSet | Exception]:
    """Opens the set of each class; an error is kept, and raised when the class's turn comes."""
    sets: dict[str, ImageSet | Exception] = {}
    for name in classes:
        try:
            sets[name] = open_image_set(source, name)
        except (InputError, UnavailableError, OSError) as error:
            sets[name] = error
    return sets


def _job_of_class(job: TrainingJob, name: str) -> TrainingJob:
    """Returns the job of one class, as if the user had asked for that class alone."""
    cache = job.data.feature_cache / name if job.data.feature_cache is not None else None
    options: dict[str, Any] = {"class": name, "out": str(job.out / name), "devices": 1, "nodes": 1}
    options |= {"feature-cache": str(cache)} if cache is not None else {}
    data = replace(job.data, feature_cache=cache)
    return replace(job, category=name, out=job.out / name, data=data, options=job.options | options, resume=True)


def _in_short(result: TrainingResult) -> str:
    last = result.last.as_dict() if result.last else {}
    metrics = {METRIC_LABELS[name]: last.get(name) for name in METRICS_SHOWN}
    figures = "".join(f", {label} {value:.4f}" for label, value in metrics.items() if value is not None)
    return f"{sum(result.seconds.values()):.1f} s{figures}"
