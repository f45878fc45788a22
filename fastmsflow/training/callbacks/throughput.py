"""Measures the speed of a run, and traces some of its steps."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, schedule

from ...distributed.process_group import ProcessGroup
from ...errors import InputError
from ...files import shown, written_aside
from ..loaders import Batch, Loader

# Steps over which the speed is averaged.
WINDOW = 50
# Steps that a trace covers, and steps before them.
TRACED, SKIPPED = 5, 5


class ThroughputCallback(Callback):
    """Measures images per second, the share of time spent waiting for data, and the GPU memory in use.

    They are logged every WINDOW steps and at the end of an epoch, and averaged over the run. Lightning's
    ThroughputMonitor does not measure the waiting, and writes to loggers only. ``unit``: the word for images, which may
    be tiles.
    """

    def __init__(self, world: ProcessGroup, unit: str = "images") -> None:
        self.line = ""
        """The last measurement as text."""
        self._world = world
        self._unit = unit
        self._run = _Window()
        self._images = 0
        self._started = self._waited = 0.0

    @property
    def speed(self) -> dict[str, float]:
        """Averages over the run without its evaluations.

        ``images_per_second`` is the sum over all processes; ``data_wait`` is a share of this process's time; on a GPU
        ``gpu_memory`` is this process's peak, in GiB.
        """
        return self._run.speed(self._world.size)

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._images = 0
        self._started = time.perf_counter()
        self._waited = _waited(trainer)

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        # A run that is resumed within an epoch gets no call at the epoch's start.
        self.on_train_epoch_start(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._images += len(batch[1])
        if not trainer.is_last_batch and (batch_idx + 1) % WINDOW:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._started
        window = _Window(self._images, seconds, _waited(trainer) - self._waited)
        speed = window.speed(self._world.size)
        memory = f", GPU {speed['gpu_memory']:.1f} GiB" if "gpu_memory" in speed else ""
        self.line = f"{speed['images_per_second']:.3g} {self._unit}/s, {speed['data_wait']:.0%} waiting{memory}"
        pl_module.log_dict(speed, on_step=True, on_epoch=False)
        self._run.add(window)
        self.on_train_epoch_start(trainer)


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


class ProfilerCallback(Callback):
    """Writes a trace of TRACED steps, after the first SKIPPED ones, for chrome://tracing or Perfetto.

    A shorter run's last steps are traced. On a GPU the trace has its kernels too. If the training ends or is
    interrupted before, the steps so far are written; Lightning's PyTorchProfiler would choose the file's name itself
    and record its own hooks.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._profiler: torch.profiler.profile | None = None
        self._sets_level = False

    def _write(self, profiler: torch.profiler.profile) -> None:
        with written_aside(self._path) as aside:
            profiler.export_chrome_trace(str(aside))
            # It is written in C++, which does not tell of a full disk, and may then leave no file.
            if not aside.is_file() or not aside.read_bytes().rstrip().endswith(b"}"):
                raise InputError(f"{shown(self._path)}: was cut short; free some space, or leave out --profile")

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        left = int(trainer.estimated_stepping_batches) - trainer.global_step
        traced = min(TRACED, left)
        skipped = min(SKIPPED, left - traced)
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        else:
            # The profiler would print lines of its own about its start, its end and the missing GPU.
            self._sets_level = "KINETO_LOG_LEVEL" not in os.environ
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        self._profiler = torch.profiler.profile(
            activities=activities,
            schedule=schedule(wait=max(0, skipped - 2), warmup=min(2, skipped), active=traced, repeat=1),
            on_trace_ready=self._write,
        )
        self._profiler.start()

    def on_train_batch_end(self, *_: Any) -> None:
        if self._profiler is not None:
            self._profiler.step()

    def on_train_end(self, *_: Any) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()
        if self._sets_level:
            os.environ.pop("KINETO_LOG_LEVEL", None)

    def on_exception(self, *_: Any) -> None:
        self.on_train_end()
