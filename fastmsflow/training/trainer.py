"""Runs Lightning's trainer with the settings of a recipe."""

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, cast

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback, EarlyStopping, LambdaCallback, LearningRateMonitor
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console

from ..cpu.features import missing_units
from ..distributed.process_group import ProcessGroup
from ..errors import InputError, InputWarning, is_meant_for_a_person
from ..progress import progress_bar
from ..quiet import Kind, QuietThread, errors_alone
from ..recipe import Precision, Recipe
from .callbacks.progress_bar import TrainingProgressBar
from .checkpointing import ResumeCheckpoint
from .datamodule import TRAIN, TrainingData
from .lightning_module import MSFlowLightningModule
from .parameter_groups import prepared_for_training
from .state_format import REMEDY

_QUIET = QuietThread(
    # Lightning recommends loader workers, but features are in memory and workers would only copy them.
    Kind(".*does not have many workers.*"),
    # The frozen extractor stays in eval mode on purpose.
    Kind(".*module.* in eval mode at the start of training.*"),
    # Metrics are computed over all processes before they are logged.
    Kind(".*sync_dist=True.*"),
    # A run of a few steps has none to warm its profiler up in.
    Kind(".*Profiler won't be using warmup.*"),
    Kind(category=FutureWarning, module="lightning"),
    Kind(".*LeafSpec.*"),
)


def check_precision(recipe: Recipe) -> None:
    """Raises: InputError if this machine does not support the recipe's precision."""
    if recipe.precision == "16-mixed" and not torch.accelerator.is_available():
        raise InputError("precision 16-mixed needs a GPU; take bf16-mixed or 32-true")


def warn_if_slow(recipe: Recipe) -> None:
    """Warns by an InputWarning if this machine computes more slowly in the recipe's precision than in float32."""
    lack = missing_units(torch.bfloat16) if recipe.precision == "bf16-mixed" else None
    if lack is not None and not torch.accelerator.is_available():
        warnings.warn(f"precision bf16-mixed: {lack}; take 32-true", InputWarning, stacklevel=3)


def prepare(source: TrainingData, console: Console) -> None:
    """Calls ``source.prepare`` under a progress bar."""
    tiles = source.tiles_of(TRAIN)
    if tiles is not None:
        console.print(f"{tiles.tiling}: {len(tiles)} tiles to train on", soft_wrap=True, highlight=False)
    what = f"features of {source.total} {'images' if tiles is None else 'tiles'}"
    with progress_bar(what, source.total or None, console=console) as bar:
        source.prepare(bar, partial(console.print, soft_wrap=True))


def run_trainer(
    module: MSFlowLightningModule,
    source: TrainingData,
    recipe: Recipe,
    console: Console,
    *,
    callbacks: Sequence[Callback] = (),
    state: Path | None = None,
    loggers: Sequence[Logger] = (),
) -> None:
    """Trains ``module`` on ``source``, from ``state`` if that is given; the model ends in eval mode on the CPU."""
    started = Event()
    callbacks = [*callbacks, TrainingProgressBar(console), LambdaCallback(on_train_start=lambda *_: started.set())]
    if recipe.patience is not None:
        callbacks.append(EarlyStopping("held_out_nll", patience=recipe.patience))
    if loggers:
        callbacks.append(LearningRateMonitor("epoch"))
    with _QUIET, errors_alone("lightning.pytorch"):
        trainer = L.Trainer(
            max_epochs=recipe.epochs,
            accumulate_grad_batches=recipe.accumulate,
            check_val_every_n_epoch=recipe.sub_epochs,
            limit_val_batches=1.0 if source.evaluated else 0,
            precision=cast(Precision, recipe.precision),
            accelerator="auto",
            **_processes(source.world),
            callbacks=callbacks,
            logger=list(loggers) or False,
            enable_checkpointing=any(isinstance(callback, ResumeCheckpoint) for callback in callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
        )
        with prepared_for_training(module.model.flow, recipe):
            try:
                trainer.fit(module, datamodule=source, ckpt_path=state, weights_only=True)
            except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
                is_of_state = state is not None and not started.is_set()
                if not is_of_state or is_meant_for_a_person(error) or isinstance(error, torch.OutOfMemoryError):
                    raise
                raise InputError(f"{state}: damaged ({type(error).__name__} in restoring it); {REMEDY}") from error
            except SystemExit as end:
                if isinstance(end.__context__, KeyboardInterrupt):
                    # Lightning turns the interrupt into exit code 1.
                    raise KeyboardInterrupt from end
                raise
    module.model.eval().to("cpu")


def _processes(world: ProcessGroup) -> dict[str, Any]:
    # Without a plugin that is named, Lightning would read the Slurm or MPI variables of a job.
    if world.size == 1:
        return {"devices": 1, "plugins": [LightningEnvironment()]}
    # DDP holds the flow's weights only; all of them are used, and no buffer changes.
    strategy = DDPStrategy(find_unused_parameters=False, broadcast_buffers=False, gradient_as_bucket_view=True)
    return {
        "devices": world.local_size,
        "num_nodes": world.size // world.local_size,
        "strategy": strategy,
        "plugins": [TorchElasticEnvironment()],
        "use_distributed_sampler": False,
    }
