"""One training run: features, sub-epochs, evaluations, files."""

import logging
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn

from .._version import __version__
from ..data import ImageDataset, ImageSet
from ..errors import InputError
from ..model import MSFlow
from .evaluation import Evaluation, Results, Truth, write_json
from .module import FeatureDataModule, Moment, MSFlowModule
from .recipe import Precision, Recipe

METRICS = ("image_auroc", "image_auroc_log", "pixel_auroc", "aupro", "aupro_log")


@dataclass(frozen=True)
class Outcome:
    """What a run came to. ``results`` and ``moments`` are empty where the set has no test images."""

    losses: list[float]
    """Mean nll of each sub-epoch, nats per image."""
    moments: list[Moment]
    """Each evaluation, with its ``epoch``."""
    results: Results | None
    """Scores after the last epoch."""
    seconds: dict[str, float]
    """Wall time of ``features`` and ``training`` (evaluations included), in seconds."""

    @property
    def last(self) -> Evaluation | None:
        """Of the last epoch; None where nothing was evaluated."""
        return self.moments[-1].evaluation if self.moments else None

    def best(self, metric: str) -> Moment | None:
        """The evaluation with the highest ``metric``: chosen on the test set, so an optimistic figure."""
        there = [m for m in self.moments if getattr(m.evaluation, metric) is not None]
        return max(there, key=lambda m: getattr(m.evaluation, metric), default=None)

    def summary(self) -> dict[str, dict[str, float | int]]:
        """Per metric: ``last``, and ``best`` with its ``best_epoch``."""
        table = {}
        for metric in METRICS:
            best = self.best(metric)
            if best is not None:
                table[metric] = {
                    "last": getattr(self.last, metric),
                    "best": getattr(best.evaluation, metric),
                    "best_epoch": best.epoch,
                }
        return table


def train(
    model: MSFlow,
    images: ImageSet,
    recipe: Recipe,
    out: Path,
    workers: int = 0,
    console: Console | None = None,
    command: str = "",
) -> Outcome:
    """Trains ``model.flow`` on ``images.train`` and evaluates on ``images.test`` after each meta epoch.

    ``workers``: processes that read images. ``console``: where progress is shown; None for nowhere.
    Into ``out`` go ``last.safetensors``, ``best.safetensors`` (highest image AUROC on the test set) and
    ``results.json``, which holds ``command`` for the record.
    Errors: InputError where images cannot be read or the loss is not finite.
    """
    console = console or Console(quiet=True)
    if not images.train:
        raise InputError(f"{images.name}: no training images")
    truth = Truth.of(images, model.image_size) if images.test else None
    model.to(memory_format=torch.channels_last)
    test = ImageDataset(images.test, model.image_size) if images.test else None
    data = FeatureDataModule(model, ImageDataset(images.train, model.image_size), test, recipe, workers)
    module = MSFlowModule(model, recipe, truth, lambda: _end_round(module, out, console))

    started = time.perf_counter()
    compute_features(data, console)
    features_done = time.perf_counter()
    # A folder that cannot be written should be found out before the training, not after.
    out.mkdir(parents=True, exist_ok=True)
    run_trainer(module, data, recipe, console)
    finished = time.perf_counter()

    outcome = Outcome(
        module.epoch_losses,
        module.moments,
        module.results,
        {"features": features_done - started, "training": finished - features_done},
    )
    write_json(
        out / "results.json",
        {
            "command": command,
            "images": {
                "name": images.name,
                "train": len(images.train),
                "test": len(images.test),
                "licence": images.licence,
            },
            "recipe": asdict(recipe),
            "model": model.config,
            "metrics": outcome.summary(),
            "seconds": outcome.seconds,
            "nll": outcome.losses,
            "evaluations": [{"epoch": m.epoch, **m.evaluation.as_dict()} for m in outcome.moments],
            "versions": {"fastmsflow": __version__, "torch": torch.__version__, "threads": torch.get_num_threads()},
        },
    )
    return outcome


def compute_features(data: FeatureDataModule, console: Console) -> None:
    """``data.compute`` under a progress bar."""
    columns = (*Progress.get_default_columns()[:-1], TimeRemainingColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(f"features of {data.total} images", total=data.total)
        data.compute(lambda done: bar.update(task, completed=done))


def _end_round(module: MSFlowModule, out: Path, console: Console) -> None:
    """After each meta epoch: a line of figures, and the model as it is."""
    epoch = len(module.epoch_losses)
    line = f"epoch {epoch:3d}  nll {module.epoch_losses[-1]:12.1f}"
    module.model.save(out / "last.safetensors", epoch=epoch)
    if module.moments:
        now = module.moments[-1].evaluation
        line += "".join(f"  {key} {value:.4f}" for key, value in now.as_dict().items() if value is not None)
        if now.image_auroc >= max(moment.evaluation.image_auroc for moment in module.moments):
            module.model.save(out / "best.safetensors", epoch=epoch, chosen_by="image AUROC on the test set")
    console.print(line, soft_wrap=True)


def run_trainer(module: MSFlowModule, data: FeatureDataModule, recipe: Recipe, console: Console) -> None:
    """Trains ``module`` on ``data``'s features; its model ends in eval mode on the CPU."""
    callbacks: list[Callback] = [RichProgressBar(leave=False)] if console.is_terminal else []
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # Features lie in memory: loader workers, which Lightning recommends, would only copy them.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        # The extractor is frozen: that it is in eval mode is meant.
        warnings.filterwarnings("ignore", message=".*module.* in eval mode at the start of training.*")
        warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        trainer = L.Trainer(
            max_epochs=recipe.epochs,
            check_val_every_n_epoch=recipe.sub_epochs,
            limit_val_batches=1.0 if module.truth is not None else 0,
            precision=cast(Precision, recipe.precision),
            accelerator="auto",
            devices=1,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=console.is_terminal,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
        )
        trainer.fit(module, datamodule=data)
    module.model.eval().to("cpu")
