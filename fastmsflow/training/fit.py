"""One training run: features, sub-epochs, evaluations, files."""

import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor
from lightning.pytorch.loggers import Logger
from rich.console import Console

from .._version import __version__
from ..data import ImageDataset, ImageSet, Sample, fingerprint
from ..errors import InputError
from ..files import shown, write_json, write_yaml
from ..model import MSFlow
from ..scoring import Scores
from .averaging import Averaging
from .callbacks import StateFile, TrainingBar, progress
from .evaluation import RANKING_METRICS, Evaluation, Truth
from .feature_cache import dtype_of
from .folder import BEST, BEST_ON_TEST, CONFIG_FILE, LAST, RESULTS_FILE, STATE_FILE, claimed, finish, keep_settings
from .loggers import check_loggers, loggers
from .module import HELD_OUT, TEST, TRAIN, FeatureDataModule, Moment, MSFlowModule
from .parts import prepared
from .recipe import Precision, Recipe

# How a moment is chosen, by what the choice is called.
LAST_EPOCH, ON_TEST, ON_HELD_OUT = "last", "best on test", "chosen on held-out"


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    losses: list[float]
    """Mean nll of each sub-epoch, nats per image."""
    moments: list[Moment]
    """After each meta epoch."""
    scores: Scores | None
    """Of the test set after the last epoch, where there is one."""
    seconds: dict[str, float]
    """Wall time of ``features`` and ``training`` (evaluations included), of this process, in seconds."""

    @property
    def last(self) -> Evaluation | None:
        """After the last epoch."""
        return self.moments[-1].evaluation

    @property
    def held_out(self) -> Moment | None:
        """The moment of the lowest nll on held-out good images: chosen without a test image."""
        return best_on_held_out(self.moments)

    def best(self, metric: str) -> Moment | None:
        """The moment of the highest ``metric``: chosen on the test set, so an optimistic figure."""
        return best_on_test(self.moments, metric)

    def summary(self) -> dict[str, dict[str, dict[str, float | int]]]:
        """metric -> how its moment was chosen -> ``value`` and ``epoch``: after the last epoch, best on the test set
        (each metric its own epoch, as the literature reports them), chosen on held-out good images."""
        table: dict[str, dict[str, dict[str, float | int]]] = {}
        for metric, value in (self.last.as_dict() if self.last else {}).items():
            if value is None:
                continue
            chosen = {LAST_EPOCH: self.moments[-1]}
            best = self.best(metric)
            if best is not None and metric in RANKING_METRICS:
                chosen[ON_TEST] = best
            if self.held_out is not None:
                chosen[ON_HELD_OUT] = self.held_out
            table[metric] = {
                how: {"value": getattr(m.evaluation, metric), "epoch": m.epoch} for how, m in chosen.items()
            }
        return table

    def by_choice(self) -> dict[str, dict[str, float]]:
        """How the moment was chosen -> metric -> value."""
        summary = self.summary()
        return {
            how: {metric: row[how]["value"] for metric, row in summary.items() if how in row}
            for how in (LAST_EPOCH, ON_HELD_OUT, ON_TEST)
            if any(how in row for row in summary.values())
        }


def best_on_held_out(moments: Sequence[Moment]) -> Moment | None:
    """The first of those with the lowest nll of the held-out images."""
    there = [m for m in moments if m.held_out_nll is not None]
    return min(there, key=lambda m: cast(float, m.held_out_nll), default=None)


def best_on_test(moments: Sequence[Moment], metric: str) -> Moment | None:
    """The first of those with the highest ``metric``."""
    there = [m for m in moments if getattr(m.evaluation, metric, None) is not None]
    return max(there, key=lambda m: getattr(m.evaluation, metric), default=None)


def train(
    model: MSFlow,
    images: ImageSet,
    recipe: Recipe,
    out: Path,
    workers: int = 0,
    console: Console | None = None,
    command: str = "",
    resume: bool = False,
    log_to: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    feature_cache: Path | None = None,
    cache_dtype: str = "bf16",
    started_from: str | None = None,
) -> Outcome:
    """Trains ``model.flow`` on ``images.train`` and evaluates after each meta epoch.

    It goes on from the weights that ``model`` has, and with its standardiser, where that has been fitted; its
    calibration is made anew. ``started_from``: the checkpoint that these are of, for the record.

    ``workers``: processes that read images. ``console``: where progress is shown; None for nowhere.
    ``feature_cache``: a folder where features are kept on disk for this and later runs, in ``cache_dtype``, bf16 or
    float32; None: they are kept in memory, in float32.
    Into ``out`` go ``config.yaml``, where ``options`` are given; ``last.safetensors``; ``best.safetensors``, of the
    lowest nll of the held-out images, where ``recipe`` holds some out; ``best_on_test.safetensors``, of the highest
    image AUROC, where there are test images; ``results.json``, which holds ``command`` for the record; until that is
    written ``state.ckpt``, from which ``resume`` goes on, on the same device to the bit as if the run had not been
    interrupted; and ``logs``, if ``log_to`` names loggers (csv, tensorboard, wandb).
    Errors: InputError where images cannot be read, the loss is not finite (with the batch's images), or ``out`` holds
    another run; where ``feature_cache`` is stale; UnavailableError for a logger that is not installed.
    """
    console = console or Console(quiet=True)
    if not images.train:
        raise InputError(f"{images.name}: no training images")
    check_loggers(log_to)
    truth = Truth.of(images, model.image_size) if images.test else None
    kept, held_out = split(images.train, recipe)
    parts = {TRAIN: kept, HELD_OUT: held_out, TEST: images.test}
    data = FeatureDataModule(
        model,
        {part: ImageDataset(of, model.image_size) for part, of in parts.items() if of},
        recipe,
        workers,
        feature_cache,
        dtype_of(cache_dtype),
    )
    description: dict[str, object] = {"name": images.name, "fingerprint": fingerprint(images)}
    settings = {
        "recipe": asdict(recipe),
        "model": {**model.config, "calibration": None},
        "images": description,
        "cache_dtype": cache_dtype if feature_cache is not None else None,
        "started_from": started_from,
    }
    averaging = Averaging(model.flow, recipe.ema) if recipe.ema is not None else None
    notes = {} if started_from is None else {"started_from": started_from}

    def end_round() -> None:
        with averaging.in_use() if averaging else nullcontext():
            _end_round(module, out, len(held_out), console, notes)

    module = MSFlowModule(
        model,
        recipe,
        {part: [shown(sample.image) for sample in of] for part, of in parts.items()},
        data.evaluated,
        truth,
        end_round,
    )
    with claimed(out, resume, settings) as state:
        model.train().to(memory_format=torch.channels_last)
        model.calibration = None
        started = time.perf_counter()
        compute_features(data, console)
        features_done = time.perf_counter()
        keep_settings(out, settings)
        if options is not None:
            write_yaml(out / CONFIG_FILE, options)
        more = [averaging] if averaging else []
        run_trainer(module, data, recipe, console, out / STATE_FILE, state, loggers(log_to, out), more)
        finished = time.perf_counter()
        outcome = Outcome(
            module.epoch_losses,
            module.moments,
            module.test_scores,
            {"features": features_done - started, "training": finished - features_done},
        )
        counts: dict[str, object] = {"train": len(kept), "held_out": len(held_out), "test": len(images.test)}
        write_json(
            out / RESULTS_FILE,
            {
                "command": command,
                "images": description | counts | {"licence": images.licence},
                "recipe": asdict(recipe),
                "model": model.config,
                "started_from": started_from,
                "metrics": outcome.summary(),
                "seconds": outcome.seconds,
                "nll": outcome.losses,
                "rounds": [
                    {
                        "epoch": m.epoch,
                        "held_out_nll": m.held_out_nll,
                        **(m.evaluation.as_dict() if m.evaluation else {}),
                    }
                    for m in outcome.moments
                ],
                "versions": {"fastmsflow": __version__, "torch": torch.__version__, "threads": torch.get_num_threads()},
            },
        )
        finish(out)
    return outcome


def split(samples: Sequence[Sample], recipe: Recipe) -> tuple[list[Sample], list[Sample]]:
    """-> (training samples, held-out samples), in their order; which are held out depends on the seed alone.

    Errors: InputError where nothing is left to train on.
    """
    count = max(1, round(recipe.hold_out * len(samples))) if recipe.hold_out else 0
    if count >= len(samples):
        raise InputError(f"{len(samples)} training images: too few to hold any out; give more, or hold out 0")
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    chosen = set(order[:count])
    return (
        [sample for i, sample in enumerate(samples) if i not in chosen],
        [sample for i, sample in enumerate(samples) if i in chosen],
    )


def compute_features(data: FeatureDataModule, console: Console) -> None:
    """``data.compute`` under a progress bar."""
    with progress(console) as bar:
        task = bar.add_task(f"features of {data.total} images", total=data.total)
        data.compute(lambda done: bar.update(task, completed=done), partial(console.print, soft_wrap=True))


def _end_round(module: MSFlowModule, out: Path, held_out: int, console: Console, notes: Mapping[str, Any]) -> None:
    """After each meta epoch: a line of figures, and the model as it is, by what it is the best so far."""
    now = module.moments[-1]
    line = f"epoch {now.epoch:3d}  nll {module.epoch_losses[-1]:.1f}"
    module.model.save(out / LAST, epoch=now.epoch, **notes)
    if now.held_out_nll is not None:
        line += f"  held-out nll {now.held_out_nll:.1f}"
        if now is best_on_held_out(module.moments):
            chosen_by = f"lowest nll of {held_out} good images held out of training"
            module.model.save(out / BEST, epoch=now.epoch, chosen_by=chosen_by, **notes)
    if now.evaluation is not None:
        shown = {name: getattr(now.evaluation, name) for name in ("image_auroc_absolute", "pixel_auroc", "aupro")}
        line += "".join(f"  {name} {value:.4f}" for name, value in shown.items() if value is not None)
        if now is best_on_test(module.moments, "image_auroc"):
            module.model.save(out / BEST_ON_TEST, epoch=now.epoch, chosen_by="image AUROC on the test set", **notes)
    console.print(line, soft_wrap=True)


def run_trainer(
    module: MSFlowModule,
    data: FeatureDataModule,
    recipe: Recipe,
    console: Console,
    state_file: Path | None = None,
    state: Path | None = None,
    log_to: Sequence[Logger] = (),
    more: Sequence[Callback] = (),
) -> None:
    """Trains ``module`` on ``data``'s features, from ``state`` if it is given; its model ends in eval mode on the CPU.

    ``state_file``: where the state is kept; None: nowhere. ``more``: callbacks besides the usual ones.
    """
    callbacks: list[Callback] = [TrainingBar(console), *more]
    if state_file is not None:
        callbacks.append(StateFile(state_file, recipe))
    if recipe.patience is not None:
        callbacks.append(EarlyStopping("held_out_nll", patience=recipe.patience))
    if log_to:
        callbacks.append(LearningRateMonitor("epoch"))
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
            accumulate_grad_batches=recipe.accumulate,
            check_val_every_n_epoch=recipe.sub_epochs,
            limit_val_batches=1.0 if module.evaluated else 0,
            precision=cast(Precision, recipe.precision),
            accelerator="auto",
            devices=1,
            callbacks=callbacks,
            logger=list(log_to) or False,
            enable_checkpointing=state_file is not None,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
        )
        with prepared(module.model.flow, recipe):
            trainer.fit(module, datamodule=data, ckpt_path=state, weights_only=True)
    module.model.eval().to("cpu")
