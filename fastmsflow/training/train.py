"""Trains one model: computes features, runs the epochs and evaluations, and writes the run's files."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from .._version import __version__
from ..data import ImageSet, ShardSet
from ..data.reader_pool import ReaderPool
from ..distributed.process_group import SINGLE_PROCESS, PeerLost, ProcessGroup, is_peer_lost
from ..errors import Preempted
from ..evaluation.checkpoint_files import BEST, BEST_ON_TEST, LAST
from ..files import write_json, write_yaml
from ..models.msflow import MSFlow
from ..recipe import WARM_UP_SHARE, DataConfig, Recipe
from .callbacks.ema import EMACallback
from .callbacks.preemption import RESUME_FROM_LAST, PreemptionHandler
from .callbacks.throughput import ProfilerCallback, ThroughputCallback
from .checkpointing import ResumeCheckpoint
from .lightning_module import MSFlowLightningModule
from .loggers import check_loggers, loggers
from .loss_monitor import NotFinite
from .run_directory import (
    CONFIG_FILE,
    NOT_FINITE_FILE,
    PROFILE_FILE,
    RESULTS_FILE,
    SETTINGS_FILE,
    STATE_FILE,
    finish,
    open_run_directory,
)
from .trainer import check_precision, prepare, run_trainer, warn_if_slow
from .training_plan import TrainingPlan, plan_training
from .training_result import TrainingResult, best_on_held_out, best_on_test

DEFAULT_DATA_CONFIG = DataConfig()
ROUND_METRICS = ("image_auroc_absolute", "pixel_auroc", "aupro")
"""The metrics that are shown of each meta epoch."""


def train(
    model: MSFlow,
    images: ImageSet | ShardSet,
    recipe: Recipe,
    out: Path,
    *,
    reading: DataConfig = DEFAULT_DATA_CONFIG,
    console: Console | None = None,
    command: str = "",
    resume: bool = False,
    log_to: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    report: Callable[[TrainingResult], None] = lambda result: None,
    profile: bool = False,
    world: ProcessGroup = SINGLE_PROCESS,
    started_from: str | None = None,
    readers: ReaderPool | None = None,
) -> TrainingResult:
    """Trains ``model.flow`` on ``images.train`` and evaluates the model after each meta epoch.

    A model that has a tiling learns from all tiles of the training images. The other images are scored as a whole.

    Training starts from the weights that ``model`` has, and with its standardiser if that has been fitted; its
    calibration is made anew.

    ``images``: an ImageSet, or a ShardSet, all of whose images are good. Validation images of the set's own are the
    held-out ones: then ``recipe`` may hold out no others. ``reading``: how images are read.
    ``console``: shows progress; None: nothing is shown. ``log_to``: names of loggers (csv, tensorboard, wandb).
    ``report``: writes what a finished run has in ``out`` besides, before ``results.json`` says that the run has
    finished. ``profile``: traces a few steps into ``out/profile.json``. ``world``: the processes that all call this
    function, after ``ProcessGroup.join``, with equal arguments: a batch is shared out among them, the losses are those
    of one process up to rounding, and the first process writes. ``command``, ``started_from`` (the checkpoint that the
    weights come from) and ``options`` are recorded with the run. ``readers``: processes that read image files, shared
    with other runs; None: this run starts its own.

    Into ``out`` go ``config.yaml``, if ``options`` are given; ``last.safetensors``; ``best.safetensors``, of the lowest
    nll of the held-out images, if ``recipe`` holds some out or the set has validation images of its own;
    ``best_on_test.safetensors``, of the highest image AUROC, if there are test images; ``results.json``; until that is
    written ``state.ckpt``, from which ``resume`` continues, on the same device to the bit as if the run had not been
    interrupted; and ``logs``, if ``log_to`` names loggers.

    Raises: InputError if images cannot be read, the loss is not finite (the message names the batch's images, as does
    ``out/not_finite.json``), ``out`` holds another run, the feature cache is stale, or a process would have no images;
    UnavailableError if a logger is not installed; Preempted after SIGTERM, when the state has been saved.
    """
    console = console if console is not None and world.first else Console(quiet=True)
    with world.raise_on_any_rank():
        check_loggers(log_to)
        check_precision(recipe)
    pool = readers or ReaderPool(reading.workers)
    plan = plan_training(model, images, recipe, reading, readers=pool, world=world)
    settings = run_settings(model, plan.description, recipe, reading, started_from=started_from, world=world)
    ema = EMACallback(model.flow, recipe.ema) if recipe.ema is not None else None
    # A model tells of which images it is, wherever its file is copied to.
    noted = {"images": plan.name, "started_from": started_from}
    notes = {key: value for key, value in noted.items() if value is not None}

    def on_round_end() -> None:
        with ema.in_use() if ema else nullcontext():
            if world.first:
                _save_models(module, out, plan.held_out_images, notes)
                _print_round(module, console)

    module = MSFlowLightningModule(
        model,
        recipe,
        plan.names,
        ground_truth=plan.ground_truth,
        on_round_end=on_round_end,
        maps_folder=out,
        world=world,
    )
    throughput = ThroughputCallback(world, "images" if model.tiling is None else "tiles")
    with PreemptionHandler() as preemption, ExitStack() as stack:
        if readers is None:
            stack.enter_context(pool)
        state = world.broadcast_from_rank0(lambda: stack.enter_context(open_run_directory(out, resume, settings)))
        model.train().to(memory_format=torch.channels_last)
        model.calibration = None
        say_if_short(recipe, console)
        if world.first and readers is None:
            # With readers of others this is one of several runs, which are warned of together.
            warn_if_slow(recipe)
        started = time.perf_counter()
        prepare(plan.source, console)
        features_done = time.perf_counter()
        with world.raise_on_any_rank():
            if world.first:
                write_json(out / SETTINGS_FILE, settings)
                if options is not None:
                    write_yaml(out / CONFIG_FILE, options)
        callbacks: list[Callback] = [throughput, ResumeCheckpoint(out / STATE_FILE, recipe, world, preemption)]
        if ema is not None:
            callbacks.append(ema)
        if profile and world.first:
            callbacks.append(ProfilerCallback(out / PROFILE_FILE))
        try:
            run_trainer(
                module, plan.source, recipe, console, callbacks=callbacks, state=state, loggers=loggers(log_to, out)
            )
        except NotFinite as error:
            write_json(out / NOT_FINITE_FILE, error.record)
            raise
        except Exception as error:
            if preemption.asked:
                # Another process was terminated first.
                raise Preempted(RESUME_FROM_LAST) from error
            if world.size > 1 and is_peer_lost(error):
                raise PeerLost(str(error)) from error
            raise
        # A run that is terminated from here on repeats these steps from its last state.
        preemption.deferred = False
        if preemption.asked:
            raise Preempted(RESUME_FROM_LAST)
        finished = time.perf_counter()
        result = TrainingResult(
            losses=module.epoch_losses,
            epoch_results=module.epoch_results,
            test_result=module.test_result,
            seconds={"features": features_done - started, "training": finished - features_done},
            speed=throughput.speed,
            left_out=plan.source.left_out,
        )
        if world.first:
            report(result)
            write_json(out / RESULTS_FILE, {"command": command, **settings, **_results(result, plan, model)})
            finish(out)
    return result


def say_if_short(recipe: Recipe, console: Console) -> None:
    """Prints a warning if the run ends before the learning rate has risen to ``recipe.lr``."""
    reached = max(recipe.lr_factor(epoch) for epoch in range(recipe.epochs))
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


def run_settings(
    model: MSFlow,
    description: Mapping[str, object],
    recipe: Recipe,
    data_config: DataConfig,
    *,
    started_from: str | None,
    world: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, Any]:
    """Returns the settings in which a resumed run must agree with its beginning; ``description``: of its images."""
    return {
        "recipe": asdict(recipe),
        "model": {**model.config, "calibration": None},
        "images": dict(description),
        "cache_dtype": data_config.cache_dtype if data_config.feature_cache is not None else None,
        "decode_on_gpu": data_config.decode_on_gpu,
        # Earlier versions' runs have none of these, and can be resumed.
        **_views(data_config),
        "started_from": started_from,
        "processes": world.size,
        # Workers share out the images of shards; no worker reads in the same order as one.
        "workers": max(1, data_config.workers) if "shards" in description else None,
    }


def _views(data_config: DataConfig) -> dict[str, Any]:
    """Returns the settings by which views of an image, or tile, differ, where they do."""
    if not data_config.varies:
        return {}
    kept = {} if data_config.stream else {"augment_variants": data_config.variants}
    return {"augment": data_config.augment, "tile_jitter": data_config.tile_jitter, **kept}


def _results(result: TrainingResult, plan: TrainingPlan, model: MSFlow) -> dict[str, Any]:
    return {
        "images": {**plan.description, **plan.counts, "licence": plan.licence},
        "left_out": result.left_out and result.left_out._asdict(),
        "model": model.config,
        "metrics": result.summary(),
        "seconds": result.seconds,
        "speed": result.speed,
        "nll": result.losses,
        "rounds": [epoch_result.as_row() for epoch_result in result.epoch_results],
        "versions": {"fastmsflow": __version__, "torch": torch.__version__, "threads": torch.get_num_threads()},
    }


def _save_models(module: MSFlowLightningModule, out: Path, held_out: str, notes: Mapping[str, Any]) -> None:
    """Saves the model after a meta epoch, also as the best one by each way of choosing that it wins."""
    current = module.epoch_results[-1]
    notes = {"epoch": current.epoch, "meta_epoch": current.epoch // module.recipe.sub_epochs, **notes}
    module.model.save(out / LAST, **notes)
    if current is best_on_held_out(module.epoch_results):
        chosen_by = f"lowest nll of {held_out}"
        module.model.save(out / BEST, chosen_by=chosen_by, **notes)
    if current is best_on_test(module.epoch_results, "image_auroc"):
        module.model.save(out / BEST_ON_TEST, chosen_by="image AUROC on the test set", **notes)


def _print_round(module: MSFlowLightningModule, console: Console) -> None:
    """Prints the losses and metrics after a meta epoch in one line."""
    current = module.epoch_results[-1]
    line = f"epoch {current.epoch:3d}  nll {module.epoch_losses[-1]:.1f}"
    if current.held_out_nll is not None:
        line += f"  held-out nll {current.held_out_nll:.1f}"
    for name in ROUND_METRICS:
        value = getattr(current.evaluation, name, None)
        if value is not None:
            line += f"  {name} {value:.4f}"
    console.print(line, soft_wrap=True)
