"""One training run: features, sub-epochs, evaluations, files."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from .._version import __version__
from ..data import ImageSet, ShardSet
from ..data.error_log import SkippedImages
from ..data.reader_pool import ReaderPool
from ..distributed.process_group import SINGLE_PROCESS, PeerLost, ProcessGroup, is_peer_lost
from ..errors import Preempted
from ..evaluation.checkpoint_files import BEST, BEST_ON_TEST, LAST, LAST_EPOCH, ON_HELD_OUT, ON_TEST
from ..evaluation.evaluator import TestResult
from ..evaluation.results import RANKING_METRICS, Evaluation
from ..files import write_json, write_yaml
from ..models.msflow import MSFlow
from ..recipe import WARM_UP_SHARE, DataConfig, Recipe
from .callbacks.ema import EMACallback
from .callbacks.preemption import LAST_KEPT, PreemptionHandler
from .callbacks.throughput import ProfilerCallback, ThroughputCallback
from .checkpointing import ResumeCheckpoint
from .data_config import plan_training
from .lightning_module import EpochResult, MSFlowLightningModule
from .loggers import check_loggers, loggers
from .loss_monitor import NotFinite
from .run_directory import (
    CONFIG_FILE,
    NOT_FINITE_FILE,
    RESULTS_FILE,
    STATE_FILE,
    finish,
    keep_settings,
    open_run_directory,
)
from .trainer import check_precision, prepare, run_trainer

READING = DataConfig()


@dataclass(frozen=True)
class TrainingResult:
    """What a run came to."""

    losses: list[float]
    """Mean over the batches of each sub-epoch of their mean nll, nats per image."""
    moments: list[EpochResult]
    """After each meta epoch."""
    tested: TestResult | None
    """The test set after the last epoch, where there is one; its maps lie in a temporary file in the run's folder."""
    seconds: dict[str, float]
    """Wall time of ``features`` and ``training`` (evaluations included), of this process, in seconds."""
    speed: dict[str, float]
    """See ThroughputCallback.speed."""
    left_out: SkippedImages | None = None
    """Of shards, where faults are skipped."""

    @property
    def last(self) -> Evaluation | None:
        """After the last epoch."""
        return self.moments[-1].evaluation

    @property
    def held_out(self) -> EpochResult | None:
        """The moment of the lowest nll on held-out good images: chosen without a test image."""
        return best_on_held_out(self.moments)

    def best(self, metric: str) -> EpochResult | None:
        """The moment of the highest ``metric``: chosen on the test set, so an optimistic figure."""
        return best_on_test(self.moments, metric)

    def summary(self) -> dict[str, dict[str, dict[str, float | int | None]]]:
        """metric -> how its moment was chosen -> ``value`` and ``epoch``: after the last epoch, best on the test set
        (each metric its own epoch, as the literature reports them), chosen on held-out good images."""
        table: dict[str, dict[str, dict[str, float | int | None]]] = {}
        for metric in self.last.as_shown() if self.last else {}:
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

    def by_choice(self) -> dict[str, dict[str, float | None]]:
        """How the moment was chosen -> metric -> value."""
        summary = self.summary()
        return {
            how: {metric: row[how]["value"] for metric, row in summary.items() if how in row}
            for how in (LAST_EPOCH, ON_HELD_OUT, ON_TEST)
            if any(how in row for row in summary.values())
        }


def best_on_held_out(moments: Sequence[EpochResult]) -> EpochResult | None:
    """The first of those with the lowest nll of the held-out images."""
    there = [m for m in moments if m.held_out_nll is not None]
    return min(there, key=lambda m: cast(float, m.held_out_nll), default=None)


def best_on_test(moments: Sequence[EpochResult], metric: str) -> EpochResult | None:
    """The first of those with the highest ``metric``."""
    there = [m for m in moments if getattr(m.evaluation, metric, None) is not None]
    return max(there, key=lambda m: getattr(m.evaluation, metric), default=None)


def train(
    model: MSFlow,
    images: ImageSet | ShardSet,
    recipe: Recipe,
    out: Path,
    reading: DataConfig = READING,
    console: Console | None = None,
    command: str = "",
    resume: bool = False,
    log_to: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    report: Callable[[TrainingResult], None] = lambda outcome: None,
    profile: bool = False,
    world: ProcessGroup = SINGLE_PROCESS,
    started_from: str | None = None,
    readers: ReaderPool | None = None,
) -> TrainingResult:
    """Trains ``model.flow`` on ``images.train`` and evaluates after each meta epoch.

    It goes on from the weights that ``model`` has, and with its standardiser, where that has been fitted; its
    calibration is made anew. ``started_from``: the checkpoint that these are of, for the record.

    ``images``: an ImageSet, or a ShardSet, all of whose images are good. ``console``: where progress is shown; None for
    nowhere. ``report``: writes what a finished run has in ``out`` besides, before ``results.json`` says that it has
    finished. ``profile``: traces a few steps into ``out/profile.json``. ``world``: the processes that all call this,
    after ``ProcessGroup.join``, with equal arguments: a batch is shared out among them, and the losses are those of one
    process up to rounding; the first one writes. ``readers``: who reads images that are files, for this run and others;
    None: processes of its own.
    Into ``out`` go ``config.yaml``, where ``options`` are given; ``last.safetensors``; ``best.safetensors``, of the
    lowest nll of the held-out images, where ``recipe`` holds some out; ``best_on_test.safetensors``, of the highest
    image AUROC, where there are test images; ``results.json``, which holds ``command`` for the record; until that is
    written ``state.ckpt``, from which ``resume`` goes on, on the same device to the bit as if the run had not been
    interrupted; and ``logs``, if ``log_to`` names loggers (csv, tensorboard, wandb).
    Errors: InputError where images cannot be read, the loss is not finite (with the batch's images, also in
    ``out/not_finite.json``), or ``out`` holds another run; where ``feature_cache`` is stale; where a process would have
    no images; UnavailableError for a logger that is not installed; Preempted after SIGTERM, the state being kept.
    """
    console = console if console is not None and world.first else Console(quiet=True)
    with world.raise_on_any_rank():
        check_loggers(log_to)
        check_precision(recipe)
    reads = readers or ReaderPool(reading.workers)
    plan = plan_training(model, images, recipe, reading, readers=reads, world=world)
    settings = settings_of(model, plan.description, recipe, reading, started_from, world)
    averaging = EMACallback(model.flow, recipe.ema) if recipe.ema is not None else None
    notes = {} if started_from is None else {"started_from": started_from}

    def end_round() -> None:
        with averaging.in_use() if averaging else nullcontext():
            if world.first:
                _end_round(module, out, plan.counts["held_out"], console, notes)

    module = MSFlowLightningModule(
        model,
        recipe,
        plan.names,
        plan.source.evaluated,
        plan.truth,
        end_round,
        out,
        world,
    )
    telemetry = ThroughputCallback(world)
    with PreemptionHandler() as preemption, ExitStack() as stack:
        if readers is None:
            stack.enter_context(reads)
        state = world.broadcast_from_rank0(lambda: stack.enter_context(open_run_directory(out, resume, settings)))
        model.train().to(memory_format=torch.channels_last)
        model.calibration = None
        say_if_short(recipe, console)
        started = time.perf_counter()
        prepare(plan.source, console)
        features_done = time.perf_counter()
        with world.raise_on_any_rank():
            if world.first:
                keep_settings(out, settings)
                if options is not None:
                    write_yaml(out / CONFIG_FILE, options)
        callbacks: list[Callback] = [telemetry, ResumeCheckpoint(out / STATE_FILE, recipe, world, preemption)]
        if averaging is not None:
            callbacks.append(averaging)
        if profile and world.first:
            callbacks.append(ProfilerCallback(out / "profile.json"))
        try:
            run_trainer(module, plan.source, recipe, console, callbacks, state, loggers(log_to, out))
        except NotFinite as error:
            write_json(out / NOT_FINITE_FILE, error.record)
            raise
        except Exception as error:
            if preemption.asked:
                # Another process has gone already.
                raise Preempted(LAST_KEPT) from error
            if world.size > 1 and is_peer_lost(error):
                raise PeerLost(str(error)) from error
            raise
        # What is left to be done is done again from the last state.
        preemption.deferred = False
        if preemption.asked:
            raise Preempted(LAST_KEPT)
        finished = time.perf_counter()
        outcome = TrainingResult(
            module.epoch_losses,
            module.moments,
            module.tested,
            {"features": features_done - started, "training": finished - features_done},
            telemetry.speed,
            plan.source.left_out,
        )
        if world.first:
            report(outcome)
            write_json(
                out / RESULTS_FILE,
                {
                    "command": command,
                    **settings,
                    "images": {**plan.description, **plan.counts, "licence": plan.licence},
                    "left_out": outcome.left_out and outcome.left_out._asdict(),
                    "model": model.config,
                    "metrics": outcome.summary(),
                    "seconds": outcome.seconds,
                    "speed": outcome.speed,
                    "nll": outcome.losses,
                    "rounds": [
                        {
                            "epoch": m.epoch,
                            "held_out_nll": m.held_out_nll,
                            **(asdict(m.evaluation) if m.evaluation else {}),
                        }
                        for m in outcome.moments
                    ],
                    "versions": {
                        "fastmsflow": __version__,
                        "torch": torch.__version__,
                        "threads": torch.get_num_threads(),
                    },
                },
            )
            finish(out)
    return outcome


def say_if_short(recipe: Recipe, console: Console) -> None:
    """Says on ``console`` where the run is over before the learning rate has risen to what was asked for."""
    reached = max(map(recipe.lr_factor, range(recipe.epochs)))
    if reached == 1:
        return
    fact = "the first milestone comes before the warm-up's end"
    if recipe.ends_in_warm_up:
        fact = f"the run ends inside the warm-up, after {recipe.epochs} of its {recipe.warm_up_epochs} passes"
    line = (
        f"{fact}; the learning rate reaches {reached:.2f} of --lr; give a shorter --warmup, or --warmup-share"
        f" {WARM_UP_SHARE}"
    )
    console.print(line, style="yellow", soft_wrap=True, highlight=False)


def settings_of(
    model: MSFlow,
    description: Mapping[str, object],
    recipe: Recipe,
    reading: DataConfig,
    started_from: str | None,
    world: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, Any]:
    """What a run that is gone on with must agree in. ``description``: of its images."""
    return {
        "recipe": asdict(recipe),
        "model": {**model.config, "calibration": None},
        "images": dict(description),
        "cache_dtype": reading.cache_dtype if reading.feature_cache is not None else None,
        "decode_on_gpu": reading.decode_on_gpu,
        "started_from": started_from,
        "processes": world.size,
        # They deal out the images of shards; one is none.
        "workers": max(1, reading.workers) if "shards" in description else None,
    }


def _end_round(
    module: MSFlowLightningModule, out: Path, held_out: int, console: Console, notes: Mapping[str, Any]
) -> None:
    """After each meta epoch: a line of figures, and the model as it is, by what it is the best so far."""
    now = module.moments[-1]
    line = f"epoch {now.epoch:3d}  nll {module.epoch_losses[-1]:.1f}"
    notes = {"epoch": now.epoch, "meta_epoch": now.epoch // module.recipe.sub_epochs, **notes}
    module.model.save(out / LAST, **notes)
    if now.held_out_nll is not None:
        line += f"  held-out nll {now.held_out_nll:.1f}"
        if now is best_on_held_out(module.moments):
            chosen_by = f"lowest nll of {held_out} good images held out of training"
            module.model.save(out / BEST, chosen_by=chosen_by, **notes)
    if now.evaluation is not None:
        shown = {name: getattr(now.evaluation, name) for name in ("image_auroc_absolute", "pixel_auroc", "aupro")}
        line += "".join(f"  {name} {value:.4f}" for name, value in shown.items() if value is not None)
        if now is best_on_test(module.moments, "image_auroc"):
            module.model.save(out / BEST_ON_TEST, chosen_by="image AUROC on the test set", **notes)
    console.print(line, soft_wrap=True)
