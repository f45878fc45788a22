"""Training runs, as `demo` and `train` ask for them: one, or one for each class; and what is said of them."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..distributed.process_group import ProcessGroup
from .every_class import train_every_class
from .fine_tuning import described_by, started_model
from .options import (
    METRIC_NAMES,
    console,
    errors,
    in_table,
    named,
    print_json,
    progress_bar,
    refuse_class_of_shards,
    say_how_exact,
)

if TYPE_CHECKING:
    from ..data import ImageSet, ShardSet
    from ..data.reader_pool import ReaderPool
    from ..models.msflow import MSFlow
    from ..training import DataConfig, Recipe, TrainingResult


@dataclass(frozen=True)
class Job:
    """What a command line asks for."""

    source: str
    category: str | None
    out: Path
    recipe: "Recipe"
    model: dict[str, Any]
    """Options of a new one."""
    image_size: int | None
    """None: the set's."""
    reading: "DataConfig"
    options: dict[str, Any]
    """All of the command's."""
    resume: bool = False
    log_to: Sequence[str] = ()
    start_from: Path | None = None
    given: frozenset[str] = frozenset()
    """The names of those parameters that were not left alone."""
    profile: bool = False
    as_json: bool = False

    def size_of(self, images: "ImageSet | ShardSet") -> tuple[int, int]:
        """(H, W) that a new model takes."""
        return (self.image_size, self.image_size) if self.image_size else images.image_size

    def build(self, size: tuple[int, int]) -> "MSFlow":
        """Errors: as MSFlow's, or where ``start_from`` does not fit."""
        from ..models.msflow import MSFlow

        if self.start_from is None:
            return MSFlow(image_size=size, **self.model)
        return started_model(self.start_from, self.model, set(self.given), size)


def train_one(job: Job, world: ProcessGroup) -> None:
    """One run, by all processes together."""
    world.join()
    console.quiet |= not world.first
    console.print("loading torch, timm and lightning ...", style="dim")
    import torch

    from ..data import ImageSet
    from ..training.run_directory import STATE_FILE

    images = world.broadcast_from_rank0(lambda: _opened(job))
    tests = f", {len(images.test)} test images" if isinstance(images, ImageSet) else ""
    count = len(images.train) if isinstance(images, ImageSet) else images.manifest.images
    console.print(f"{escape(images.name)}: {count} training images{tests}", soft_wrap=True)
    if isinstance(images, ImageSet) and images.licence:
        console.print(images.licence, style="dim")
    torch.manual_seed(job.recipe.seed)
    with world.raise_on_any_rank():
        model = job.build(job.size_of(images))
    if job.resume and not (job.out / STATE_FILE).exists():
        console.print(escape(f"{job.out}: no state to go on from; the run begins anew"), soft_wrap=True)
    with _interruptible(world):
        outcome = _run(job, images, model, console, world)
    if outcome.test_result is not None:
        _print_metrics(outcome)
    _print_threshold(model)
    speed = outcome.speed
    if not world.first:
        world.leave()
        return
    console.print(
        f"features {outcome.seconds['features']:.0f} s, training {outcome.seconds['training']:.0f} s"
        f" ({speed.get('images_per_second', 0):.3g} images/s, {speed.get('data_wait', 0):.0%} of it waiting for them);"
        f" in {escape(str(job.out))}:"
        f" {', '.join(sorted(path.name for path in job.out.iterdir() if path.name[0] != '.'))}",
        soft_wrap=True,
    )
    left_out = outcome.left_out
    if left_out is not None and left_out.faults:
        line = f"{left_out.images} images left out by faults in {left_out.faults} images or shards: see "
        console.print(escape(f"{line}{job.reading.skip_faults}"), style="yellow", soft_wrap=True, highlight=False)
    if job.as_json:
        content = {"metrics": outcome.summary(), "nll": outcome.losses, "seconds": outcome.seconds, "speed": speed}
        print_json({"out": str(job.out), **content, "left_out": left_out and left_out._asdict()})
    world.leave()


def train_all(job: Job, world: ProcessGroup) -> None:
    """A run for each class, each by one of the processes, which have joined apart."""
    if world.first:
        console.print("loading torch, timm and lightning ...", style="dim")
    from ..data.reader_pool import ReaderPool
    from ..data.shards.shard_set import is_shard_set
    from ..training.data_config import check_reading, description_of
    from ..training.loggers import check_loggers, close_loggers
    from ..training.multi_class import ModelFactory
    from ..training.train import say_if_short, settings_of
    from ..training.trainer import check_precision

    # Once, and not of each class.
    check_loggers(job.log_to)
    check_precision(job.recipe)
    check_reading(job.reading, is_shard_set(job.source))
    if world.size > 1 and world.first:
        # Then no run prints.
        say_if_short(job.recipe, console)

    def settings(model: "MSFlow", images: "ImageSet") -> dict[str, Any]:
        return settings_of(model, description_of(images, job.reading), job.recipe, job.reading, started_from(job))

    def run(name: str, images: "ImageSet", model: "MSFlow", where: Console) -> "TrainingResult":
        folder = job.reading.feature_cache
        cache = folder / name if folder is not None else None
        # As if each had been asked for by its name.
        options = {"class": name, "out": str(job.out / name), "devices": 1, "nodes": 1}
        options |= {"feature-cache": str(cache)} if cache is not None else {}
        reading = replace(job.reading, feature_cache=cache)
        own = replace(job, out=job.out / name, reading=reading, options=job.options | options, resume=True)
        try:
            return _run(own, images, model, where, ProcessGroup(), readers)
        except Exception:
            # Maybe because one was killed, which may show anywhere.
            readers.end()
            raise
        finally:
            close_loggers(job.log_to)

    models = ModelFactory(job.build, job.recipe.seed)
    with ReaderPool(job.reading.workers) as readers, _interruptible(world):
        train_every_class(job.source, job.out, models, job.size_of, settings, run, world, job.as_json)


@contextmanager
def _interruptible(world: ProcessGroup) -> Iterator[None]:
    """Ctrl-C ends the command with a line."""
    from ..training.callbacks.preemption import RESUME_FROM_LAST

    try:
        yield
    except KeyboardInterrupt as interrupt:
        if world.first:
            errors.print(f"interrupted; {RESUME_FROM_LAST}", soft_wrap=True, highlight=False)
        raise typer.Exit(130) from interrupt


def started_from(job: Job) -> str | None:
    return None if job.start_from is None else str(job.start_from)


def _opened(job: Job) -> "ImageSet | ShardSet":
    from ..data import ShardSet, open_image_set
    from ..data.shards.shard_set import is_shard_set

    if not is_shard_set(job.source):
        return open_image_set(job.source, job.category)
    if job.category is not None:
        refuse_class_of_shards(job.source)
    return ShardSet.from_source(job.source)


def _run(
    job: Job,
    images: "ImageSet | ShardSet",
    model: "MSFlow",
    where: Console,
    world: ProcessGroup,
    readers: "ReaderPool | None" = None,
) -> "TrainingResult":
    """Trains, and leaves the curves and the report too in the run's folder. ``where``: shows progress; ``readers``: see
    fastmsflow.training.train."""
    import torch

    from ..data import ImageSet
    from ..evaluation.test_report import write_test_report
    from ..training import train
    from ..visualization.plots import plot_training

    out = job.out
    options = job.options if job.start_from is None else job.options | described_by(model)

    def report(outcome: "TrainingResult") -> None:
        summary = outcome.summary()
        held_out = [(m.epoch, m.held_out_nll) for m in outcome.epoch_results if m.held_out_nll is not None]
        curves = {
            METRIC_NAMES[key]: [(m.epoch, getattr(m.evaluation, key)) for m in outcome.epoch_results]
            for key in ("image_auroc_absolute", "pixel_auroc", "aupro")
            if key in summary
        }
        plot_training(out / "training.png", outcome.losses, held_out, curves)
        tested = outcome.test_result
        if tested is not None and tested.maps is not None and isinstance(images, ImageSet):
            metrics = {how: named(values) for how, values in outcome.by_choice().items()}
            seen = (tested.scores, tested.maps, tested.pro_curve())
            with progress_bar("writing the report", len(images.test), where) as bar:
                write_test_report(out, images, model, *seen, metrics, options, bar)
            tested.maps.close()

    if torch.cuda.is_available():
        model.cuda()
    command = shlex.join(["fastmsflow", *sys.argv[1:]])
    return train(
        model, images, job.recipe, out, reading=job.reading, console=where, command=command, resume=job.resume,
        log_to=job.log_to, options=options, report=report, profile=job.profile, world=world,
        started_from=started_from(job), readers=readers,
    )  # fmt: skip


def _print_metrics(outcome: "TrainingResult") -> None:
    choices = outcome.by_choice()
    table = Table("metric", *choices)
    for metric, chosen in outcome.summary().items():
        cells = (
            f"{in_table(chosen[how]['value'])} ({chosen[how]['epoch']})" if how in chosen else "" for how in choices
        )
        table.add_row(METRIC_NAMES[metric], *cells)
    say_how_exact(table, [m.evaluation.pixel_error for m in outcome.epoch_results if m.evaluation is not None])
    console.print(table)
    console.print("(epoch); best on test: each metric's own epoch, chosen by the test set, so optimistic", style="dim")


def _print_threshold(model: "MSFlow") -> None:
    calibration = model.calibration
    if calibration is None:
        console.print("no threshold: no images were held out; `fastmsflow calibrate` sets one", style="dim")
    elif calibration.is_enough():
        console.print(f"threshold: {calibration.threshold()}", soft_wrap=True)
    else:
        console.print(f"no threshold: {calibration.shortage()}", style="yellow", soft_wrap=True)
