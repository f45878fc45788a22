"""How fast a run is, and what its time goes into."""

import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerAction, ProfilerActivity

from ...distributed.process_group import ProcessGroup
from ...files import written_aside
from ..loaders import Batch, Loader

# Steps a figure is of.
WINDOW = 50
# Steps of a trace, and before it.
TRACED, SKIPPED = 5, 5


class ThroughputCallback(Callback):
    """How fast images are learned from, what share of the time is spent waiting for them, and how much of the GPU's
    memory is used: logged every WINDOW steps and at an epoch's end, and kept over the run."""

    def __init__(self, world: ProcessGroup) -> None:
        self.line = ""
        """What was last measured."""
        self._world = world
        self._whole = _Window()
        self._images = 0
        self._began = self._waited = 0.0

    @property
    def speed(self) -> dict[str, float]:
        """Over the run, evaluations left out: ``images_per_second`` of all processes, ``data_wait``, a share of the
        time, and on a GPU ``gpu_memory``, GiB at most, both of this process."""
        return self._whole.speed(self._world.size)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # A run that is resumed within an epoch sees no start of it.
        self._begin(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer)

    def _begin(self, trainer: L.Trainer) -> None:
        self._images = 0
        self._began = time.perf_counter()
        self._waited = _waited(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._images += len(batch[1])
        if not trainer.is_last_batch and (batch_idx + 1) % WINDOW:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._began
        window = _Window(self._images, seconds, _waited(trainer) - self._waited)
        speed = window.speed(self._world.size)
        self.line = _shown(speed)
        pl_module.log_dict(speed, on_step=True, on_epoch=False)
        self._whole.add(window)
        self._begin(trainer)


def _waited(trainer: L.Trainer) -> float:
    return cast(Loader, trainer.train_dataloader).waited


@dataclass
class _Window:
    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def add(self, other: "_Window") -> None:
        self.images += other.images
        self.seconds += other.seconds
        self.waited += other.waited

    def speed(self, processes: int) -> dict[str, float]:
        if not self.seconds:
            return {}
        speed = {
            "images_per_second": self.images * processes / self.seconds,
            "data_wait": self.waited / self.seconds,
        }
        if torch.cuda.is_available():
            speed["gpu_memory"] = torch.cuda.max_memory_allocated() / 2**30
        return speed


def _shown(speed: dict[str, float]) -> str:
    memory = f", GPU {speed['gpu_memory']:.1f} GiB" if "gpu_memory" in speed else ""
    return f"{speed['images_per_second']:.3g} images/s, {speed['data_wait']:.0%} waiting{memory}"


class ProfilerCallback(Callback):
    """A trace for chrome://tracing or Perfetto: of the TRACED steps behind the first SKIPPED, or of the run's last ones
    where it has fewer steps than that, on a GPU of what runs there too. It is written once they are through, or, of
    those that there were, when the training ends before or is interrupted."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._profiler: torch.profiler.profile | None = None

    def _write(self, profiler: torch.profiler.profile) -> None:
        with written_aside(self._path) as aside:
            profiler.export_chrome_trace(str(aside))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        left = int(trainer.estimated_stepping_batches) - trainer.global_step
        traced = min(TRACED, left)
        skipped = min(SKIPPED, left - traced)
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        else:
            # Nothing: else lines of its own, of its beginning, its end and the GPU that it misses.
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        self._profiler = torch.profiler.profile(
            activities=activities, schedule=partial(_action, skipped, traced), on_trace_ready=self._write
        )
        self._profiler.start()

    def on_train_batch_end(self, *_: Any) -> None:
        if self._profiler is not None:
            self._profiler.step()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()


def _action(skipped: int, traced: int, step: int) -> ProfilerAction:
    """Of the profiler in ``step``, from 0. It warms up in the last two that are skipped."""
    if not skipped - 2 <= step < skipped + traced:
        return ProfilerAction.NONE
    if step < skipped:
        return ProfilerAction.WARMUP
    return ProfilerAction.RECORD if step < skipped + traced - 1 else ProfilerAction.RECORD_AND_SAVE
