"""Lightning's trainer, as a run needs it."""

import logging
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console

from ..distributed.process_group import ProcessGroup
from ..errors import InputError
from ..progress import progress
from ..recipe import Precision, Recipe
from .callbacks.progress_bar import TrainingProgressBar
from .checkpointing import ResumeCheckpoint
from .datamodule import TrainingData
from .lightning_module import MSFlowLightningModule
from .parameter_groups import prepared


def check_precision(recipe: Recipe) -> None:
    """Errors: InputError where Lightning would take another on this machine."""
    if recipe.precision == "16-mixed" and not torch.accelerator.is_available():
        raise InputError("precision 16-mixed needs a GPU; take bf16-mixed or 32-true")


def prepare(source: TrainingData, console: Console) -> None:
    """``source.prepare`` under a progress bar."""
    with progress(console) as bar:
        task = bar.add_task(f"features of {source.total} images", total=source.total or None)
        source.prepare(lambda done: bar.update(task, completed=done), partial(console.print, soft_wrap=True))


def run_trainer(
    module: MSFlowLightningModule,
    source: TrainingData,
    recipe: Recipe,
    console: Console,
    callbacks: Sequence[Callback] = (),
    state: Path | None = None,
    log_to: Sequence[Logger] = (),
) -> None:
    """Trains ``module`` on ``source``, from ``state`` if it is given; its model ends in eval mode on the CPU."""
    callbacks = [*callbacks, TrainingProgressBar(console)]
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
        # What is logged after an evaluation is of all processes already.
        warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
        warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        trainer = L.Trainer(
            max_epochs=recipe.epochs,
            accumulate_grad_batches=recipe.accumulate,
            check_val_every_n_epoch=recipe.sub_epochs,
            limit_val_batches=1.0 if module.evaluated else 0,
            precision=cast(Precision, recipe.precision),
            accelerator="auto",
            **_processes(source.world),
            callbacks=callbacks,
            logger=list(log_to) or False,
            enable_checkpointing=any(isinstance(callback, ResumeCheckpoint) for callback in callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
        )
        with prepared(module.model.flow, recipe):
            try:
                trainer.fit(module, datamodule=source, ckpt_path=state, weights_only=True)
            except SystemExit as end:
                if isinstance(end.__context__, KeyboardInterrupt):
                    # Lightning makes an exit code of 1 of it.
                    raise KeyboardInterrupt from end
                raise
    module.model.eval().to("cpu")


def _processes(world: ProcessGroup) -> dict[str, Any]:
    # Named, or Lightning would take a job's Slurm or MPI variables for its processes.
    if world.size == 1:
        return {"devices": 1, "plugins": [LightningEnvironment()]}
    # Only the flow's weights are in it; all of them are used, and no buffer of it changes.
    strategy = DDPStrategy(find_unused_parameters=False, broadcast_buffers=False, gradient_as_bucket_view=True)
    return {
        "devices": world.local_size,
        "num_nodes": world.size // world.local_size,
        "strategy": strategy,
        "plugins": [TorchElasticEnvironment()],
        "use_distributed_sampler": False,
    }
