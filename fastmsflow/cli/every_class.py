"""train --class all: the classes one after the other, or shared out among processes, and what they came to."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..distributed.process_group import ProcessGroup
from ..errors import InputError, UnavailableError, in_one_line
from ..files import shown
from .options import METRIC_NAMES, console, errors, every_class_of, in_table, print_json

if TYPE_CHECKING:
    from ..data import ImageSet
    from ..evaluation.compare_checkpoints import CheckpointResult
    from ..models.msflow import MSFlow
    from ..training import TrainingResult
    from ..training.multi_class import ModelFactory

METRICS_SHOWN = ("image_auroc_absolute", "pixel_auroc", "aupro", "f1")


def train_every_class(
    source: str,
    out: Path,
    models: "ModelFactory",
    size_of: Callable[["ImageSet"], tuple[int, int]],
    settings: Callable[["MSFlow", "ImageSet"], Mapping[str, Any]],
    run: Callable[[str, "ImageSet", "MSFlow", Console], "TrainingResult"],
    world: ProcessGroup,
    as_json: bool,
) -> None:
    """``run``: of a class, into ``out``/CLASS, with progress on a console. ``settings``: of such a run."""
    from ..training.multi_class import train_each

    started = time.perf_counter()
    classes = world.broadcast_from_rank0(lambda: every_class_of(source))
    sets = _opened(source, classes)
    sizes = {name: size_of(images) for name, images in sets.items() if not isinstance(images, Exception)}

    def begin() -> list[str]:
        # What is wrong with the model is wrong for all of them.
        for size in dict.fromkeys(sizes.values()):
            models.untouched(size)
        return _finished(out, sets, lambda name, of: settings(models.untouched(sizes[name]), of))

    finished = world.broadcast_from_rank0(begin)
    world.leave()
    for name in finished if world.first else ():
        console.print(escape(f"{shown(name)}: finished, skipped"), style="dim", soft_wrap=True)
    # Bars of several processes on one terminal would write over each other.
    where = console if world.size == 1 else Console(quiet=True)

    begun, ahead = time.perf_counter(), [name for name in classes if name not in finished]

    def work(name: str) -> None:
        line = f"class {classes.index(name) + 1} of {len(classes)}: {shown(name)}"
        done = ahead.index(name)
        if world.size == 1 and done:
            line += f" (about {(time.perf_counter() - begun) / done * (len(ahead) - done):.0f} s left)"
        console.print(escape(line), soft_wrap=True)
        images = sets[name]
        if isinstance(images, Exception):
            raise images
        outcome = run(name, images, models.new(sizes[name]), where)
        console.print(escape(f"{shown(name)}: {_in_short(outcome)}"), soft_wrap=True, highlight=False)

    failures = train_each(out, classes, work, _print_failure, world.rank, world.size)
    if world.first:
        _conclude(out, classes, failures, len(finished), time.perf_counter() - started, as_json)


def _opened(source: str, classes: Sequence[str]) -> "dict[str, ImageSet | Exception]":
    """A set, or what is wrong with it, which is said when its turn comes."""
    from ..data import open_image_set

    sets: dict[str, ImageSet | Exception] = {}
    for name in classes:
        try:
            sets[name] = open_image_set(source, name)
        except (InputError, UnavailableError, OSError) as error:
            sets[name] = error
    return sets


def _finished(
    out: Path,
    sets: "Mapping[str, ImageSet | Exception]",
    settings: Callable[[str, "ImageSet"], Mapping[str, Any]],
) -> list[str]:
    """Before any class begins: what is there must be of this command, and what failed is tried again. -> the classes
    that are finished. Errors: InputError where a class's run has other settings."""
    from ..training.multi_class import forget_failure
    from ..training.run_directory import has_finished, refuse_another

    for name, images in sets.items():
        folder = out / name
        if not isinstance(images, Exception) and folder.is_dir():
            refuse_another(folder, settings(name, images))
    for name in sets:
        forget_failure(out / name)
    return [name for name in sets if has_finished(out / name)]


def _in_short(outcome: "TrainingResult") -> str:
    last = outcome.last.as_dict() if outcome.last else {}
    named = {METRIC_NAMES[metric]: last.get(metric) for metric in METRICS_SHOWN}
    figures = "".join(f", {name} {value:.4f}" for name, value in named.items() if value is not None)
    return f"{sum(outcome.seconds.values()):.1f} s{figures}"


def _print_failure(name: str, reason: str) -> None:
    errors.print(f"[red]{escape(shown(name))}: failed:[/red] {escape(reason)}", soft_wrap=True, highlight=False)


def _conclude(
    out: Path, classes: Sequence[str], failures: dict[str, str], skipped: int, wall: float, as_json: bool
) -> None:
    """One table of all classes, printed and written; ``wall``: seconds of this call, before which ``skipped`` classes
    were finished. Errors: typer.Exit where one failed."""
    from ..evaluation.compare_checkpoints import mean_of, write_metrics
    from ..training.multi_class import results_of
    from ..visualization.markdown_table import write_markdown_table

    rows: dict[str, list[CheckpointResult]] = {}
    seconds: dict[str, float] = {}
    for name in classes:
        if name in failures:
            continue
        try:
            rows[name], seconds[name] = results_of(out / name)
        except InputError as error:
            failures[name] = in_one_line(error)
    judged = [row for of_class in rows.values() for row in of_class]
    # A mean is of all classes.
    mean = mean_of(judged) if not failures and all(rows.values()) else []
    metrics = [m for m in METRICS_SHOWN if any(getattr(row.evaluation, m) is not None for row in judged)]
    header = ("class", "checkpoint", *(METRIC_NAMES[metric] for metric in metrics), "seconds")
    table = Table(*header)
    lines: list[tuple[str, ...]] = []
    for name in classes:
        took = f"{seconds[name]:.1f}" if name in seconds else ""
        lines += _lines(shown(name), rows.get(name, []), metrics, took, "failed" if name in failures else "")
    lines += _lines("mean", mean, metrics, f"{sum(seconds.values()) / len(seconds):.1f}") if mean else []
    for line in lines:
        table.add_row(*map(escape, line), style="red" if line[1] == "failed" else None)
    console.print(table)
    before = f"; {skipped} finished before, the last call took" if skipped else " in"
    notes = f"{len(seconds)} of {len(classes)} classes, {sum(seconds.values()):.0f} s of training{before} {wall:.0f} s"
    console.print(notes, style="dim")
    if judged:
        write_metrics(out, [*judged, *mean])
    failed = "".join(f"\n- {shown(name)} failed: {reason}" for name, reason in failures.items())
    write_markdown_table(out / "summary.md", f"{len(classes)} classes", header, lines, f"{notes}\n{failed}")
    console.print(f"written to {escape(str(out))}", soft_wrap=True)
    if as_json:
        content = {"rows": [row.as_dict() for row in (*judged, *mean)], "seconds": seconds, "failed": failures}
        print_json({"out": str(out), "wall_seconds": wall, **content})
    if failures:
        for name, reason in failures.items():
            _print_failure(name, reason)
        errors.print(f"[red]{len(failures)} of {len(classes)} classes failed; the same command tries them again[/red]")
        raise typer.Exit(1)


def _lines(
    name: str, rows: "Sequence[CheckpointResult]", metrics: Sequence[str], seconds: str, instead: str = ""
) -> list[tuple[str, ...]]:
    """A class's part of the table, its name and seconds in the first line."""
    if not rows:
        return [(name, instead, *("" for _ in metrics), seconds)]
    lines = []
    for i, row in enumerate(rows):
        cells = (in_table(getattr(row.evaluation, metric)) for metric in metrics)
        lines.append(("" if i else name, row.checkpoint, *cells, "" if i else seconds))
    return lines
