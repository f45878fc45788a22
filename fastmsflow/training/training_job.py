"""A training run as a user asks for it: an image set by name, a model, settings, and what the run leaves in its
folder, curves and report included."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..data import ImageSet, ShardSet, open_image_set
from ..data.class_selection import refuse_class_of_shards
from ..data.reader_pool import ReaderPool
from ..data.shards.shard_set import is_shard_set
from ..distributed.process_group import ProcessGroup
from ..errors import InputError
from ..evaluation.metric_labels import METRIC_LABELS, labeled
from ..evaluation.report import write_test_report
from ..models.msflow import MSFlow
from ..owned_files import CURVES
from ..progress import progress_bar
from ..recipe import DataConfig, Recipe
from ..visualization.plots import plot_training
from .held_out import check_hold_out, validation_of
from .start_from import model_from_checkpoint, model_options, tiling_of
from .train import ROUND_METRICS, train
from .training_result import TrainingResult


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """A training run as a user asks for it."""

    source: str
    """An image set or a set of shards, by name or path."""
    category: str | None = None
    out: Path
    recipe: Recipe
    data: DataConfig
    model: dict[str, Any]
    """Options of a new model."""
    image_size: tuple[int, int] | None = None
    """(H, W) of the model's images; None: the set's, or a tile's."""
    tiles: Mapping[str, Any] = field(default_factory=dict)
    """The arguments of a Tiling that the user gave; none for whole images."""
    options: dict[str, Any]
    """All options of the command, which the run's folder records."""
    resume: bool = False
    loggers: Sequence[str] = ()
    start_from: Path | None = None
    """The checkpoint whose weights the run starts from; None: new weights."""
    chosen: frozenset[str] = frozenset()
    """Names of the options that the user gave."""
    changed: frozenset[str] = frozenset()
    """Those of them that are on the command line, or of which a file has another value than the default."""
    profile: bool = False

    @property
    def started_from(self) -> str | None:
        """The path of ``start_from``, for the record."""
        return None if self.start_from is None else str(self.start_from)

    def open_images(self) -> ImageSet | ShardSet:
        """Opens the image set or the set of shards. Raises: InputError if it is not there or has no such class."""
        if not is_shard_set(self.source):
            return open_image_set(self.source, self.category)
        if self.category is not None:
            refuse_class_of_shards(self.source)
        return ShardSet.from_source(self.source)

    def image_size_for(self, images: ImageSet | ShardSet) -> tuple[int, int]:
        """Returns the (H, W) that the model takes."""
        if "tile" in self.tiles:
            return self.tiles["tile"], self.tiles["tile"]
        return self.image_size or images.image_size

    def build_model(self, image_size: tuple[int, int]) -> MSFlow:
        """Builds a new model, or loads that of ``start_from``. Raises: InputError if the options do not fit."""
        if self.start_from is None:
            model = MSFlow(image_size=image_size, **self.model)
            model.tiling = tiling_of(self.tiles)
            return model
        return model_from_checkpoint(self.start_from, {**self.model, **self.tiles}, set(self.chosen), image_size)

    def recipe_for(self, images: ImageSet | ShardSet) -> Recipe:
        """Returns the recipe of a run on ``images``: where they have validation images of their own, no others are held
        out unless the user asks for it.

        Raises: InputError if settings of held-out images do not fit ``images``, or would have no effect.
        """
        recipe, has_own = self.recipe, bool(validation_of(images))
        if has_own and "hold_out" not in self.changed:
            recipe = replace(recipe, hold_out=0.0)
        check_hold_out(images, recipe)
        for name in ("false_alarms", "false_pixels"):
            if name in self.changed and not has_own and not recipe.hold_out:
                raise InputError(
                    f"--{name.replace('_', '-')} sets a threshold by held-out images; give --hold-out, e.g. 0.1, or"
                    " leave it out"
                )
        return recipe

    def run(
        self,
        model: MSFlow,
        images: ImageSet | ShardSet,
        *,
        console: Console,
        group: ProcessGroup,
        readers: ReaderPool | None = None,
    ) -> TrainingResult:
        """Trains ``model`` and writes the curves and the report of the test set, too, into the run's folder.

        ``console`` shows progress; ``group`` and ``readers``: see fastmsflow.training.train, as for errors.
        """
        with group.raise_on_any_rank():
            recipe = self.recipe_for(images)
        options = self.options if self.start_from is None else self.options | model_options(model)
        if validation_of(images):
            # The default was not used, and a file with it would ask for it.
            options = {name: value for name, value in options.items() if name != "hold-out"}
        if torch.cuda.is_available():
            model.cuda()
        return train(
            model,
            images,
            recipe,
            self.out,
            reading=self.data,
            console=console,
            command=shlex.join(["fastmsflow", *sys.argv[1:]]),
            resume=self.resume,
            log_to=self.loggers,
            options=options,
            report=lambda result: self._write_report(result, model, images, options=options, console=console),
            profile=self.profile,
            world=group,
            started_from=self.started_from,
            readers=readers,
        )

    def _write_report(
        self,
        result: TrainingResult,
        model: MSFlow,
        images: ImageSet | ShardSet,
        *,
        options: dict[str, Any],
        console: Console,
    ) -> None:
        summary = result.summary()
        held_out = [(r.epoch, r.held_out_nll) for r in result.epoch_results if r.held_out_nll is not None]
        values = {
            METRIC_LABELS[name]: [(r.epoch, getattr(r.evaluation, name)) for r in result.epoch_results]
            for name in ROUND_METRICS
            if name in summary
        }
        # A metric may not be defined.
        curves = {label: points for label, points in values.items() if all(value is not None for _, value in points)}
        plot_training(self.out / CURVES, result.losses, held_out, curves)
        tested = result.test_result
        if tested is None or tested.maps is None or not isinstance(images, ImageSet):
            return
        metrics = {choice: labeled(values) for choice, values in result.by_choice().items()}
        with progress_bar("writing the report", len(images.test), console=console) as bar:
            write_test_report(self.out, images, model, tested, metrics=metrics, settings=options, progress=bar)
        tested.maps.close()
