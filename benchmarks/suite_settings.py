"""Sets where and at what size the suite runs, and how it measures."""

import gc
import importlib.metadata
import importlib.util
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from fastmsflow.benchmarking import LEVELS
from fastmsflow.kernels import configs
from fastmsflow.kernels.launch import INTERPRETED

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SECONDS = 1.0  # of measuring a row;
KERNEL_SECONDS = 0.2  # of one with a single kernel
FEWEST, MOST = 5, 50  # rounds of a row
LAUNCHES = 32  # in a graph, where a single kernel is measured
RUNTIMES = ("onnxruntime", "openvino")
# Linux's names of a CPU's units, and their makers'.
UNITS = {"avx2": "AVX2", "avx512f": "AVX512", "avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16"}
# Whether everything runs once only, to see that it does.
rehearsing = False


@dataclass(frozen=True)
class Size:
    """Describes what is measured."""

    channels: tuple[int, int, int]
    blocks: tuple[int, int, int]
    extractor: str
    image: int
    batches: tuple[int, ...]
    training_batch: int
    kernel_levels: tuple[tuple[int, int], ...]
    """Channels and grid of each level at which single kernels run."""

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        return tuple((self.image // stride, self.image // stride) for stride in (8, 16, 32))


SIZES = {
    # The published model. On a CPU, batches that it does in seconds.
    "default": Size(
        (256, 512, 1024),
        (2, 5, 8),
        "wide_resnet50_2",
        512,
        (8, 1, 32) if DEVICE.type == "cuda" else (1, 4),
        16 if DEVICE.type == "cuda" else 2,
        LEVELS,
    ),
    # For the suite's own tests.
    "small": Size((24, 32, 48), (1, 1, 1), "test_efficientnet.r160_in1k", 64, (2, 1), 2, ((16, 3),)),
}


def hasten_interpreter() -> None:
    """Spares Triton's interpreter, where it runs, work that the suite does not need: about half of its time."""
    if INTERPRETED:
        from tests.helpers import interpreter

        interpreter.hasten_interpreter()


@cache
def environment() -> dict[str, Any]:
    """Returns what every row carries, besides ``clocks``."""
    row: dict[str, Any] = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        **_runtimes(),
        "python": platform.python_version(),
        "commit": os.environ.get("COMMIT") or _output("git", "rev-parse", "--short=12", "HEAD"),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else _cpu(),
        "units": [] if DEVICE.type == "cuda" else cpu_units(),
        "chip": configs.chip(DEVICE),
    }
    return row | _gpu("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem")


def clocks() -> dict[str, str]:
    """Reads a GPU's clock, in MHz, and its temperature, in degrees Celsius, now."""
    return _gpu("clocks.sm", "clocks.mem", "temperature.gpu")


def _gpu(*fields: str) -> dict[str, str]:
    if DEVICE.type != "cuda":
        return {}
    values = _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits").split(", ")
    return dict(zip(fields, values, strict=False))


def _runtimes() -> dict[str, str]:
    """Returns versions of the runtimes that are timed on a CPU, where they are installed."""
    names = [] if DEVICE.type == "cuda" else [name for name in RUNTIMES if importlib.util.find_spec(name)]
    return {name: importlib.metadata.version(name) for name in names}


def _cpu() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def cpu_units() -> list[str]:
    """Returns the CPU's units that float32 and bfloat16 products gain from, as far as the system tells of them."""
    flags = _cpu_info("flags").split()
    return [unit for flag, unit in UNITS.items() if flag in flags]


def _cpu_info(field: str) -> str:
    """Returns what Linux says of the first core, or nothing."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith(field):
            return line.partition(":")[2].strip()
    return ""


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@cache
def _cache_bytes() -> int:
    return torch.cuda.get_device_properties(DEVICE).L2_cache_size if DEVICE.type == "cuda" else 32 << 20


def rotated(make: Callable[[], Sequence[Tensor]]) -> Iterator[Sequence[Tensor]]:
    """Inputs without end, of which twice the cache's bytes are made: none is in the cache when its turn comes."""
    first = make()
    size = sum(x.numel() * x.element_size() for x in first)
    count = min(32, max(2, math.ceil(2 * _cache_bytes() / size)))
    return cycle([first, *(make() for _ in range(count - 1))])


def footprint() -> int:
    """Bytes of GPU memory in use, the pools of recorded graphs included."""
    if DEVICE.type != "cuda":
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def measure(
    benchmark: Any,
    call: Callable[[Sequence[Tensor]], object],
    inputs: Iterator[Sequence[Tensor]],
    before: int | None = None,
    seconds: float = SECONDS,
) -> None:
    """Times ``call`` to the end of its work, each round on the next inputs, for about ``seconds``.

    ``before``: the footprint without what is measured; what it adds at its peak, weights included, is noted.
    """

    def once() -> None:
        call(next(inputs))
        synchronize()

    if rehearsing:
        benchmark.pedantic(once, rounds=1)
        benchmark.extra_info |= environment()
        return
    # Compiles, tunes, records.
    for _ in range(3):
        once()
    if DEVICE.type == "cuda" and before is not None:
        held = footprint()
        torch.cuda.reset_peak_memory_stats()
        once()
        benchmark.extra_info["peak_bytes"] = max(held, torch.cuda.max_memory_allocated()) - before
    start = time.perf_counter()
    once()
    rounds = int(min(MOST, max(FEWEST, seconds / (time.perf_counter() - start))))
    benchmark.pedantic(once, rounds=rounds, iterations=1, warmup_rounds=1)
    benchmark.extra_info |= environment() | clocks()


def measure_launches(benchmark: Any, launch: Callable[[Sequence[Tensor]], object], inputs: Sequence[Tensor]) -> None:
    """Times many launches recorded in one graph, each on the next of ``inputs``: the kernels' time, not Python's.

    The row's times are of ``launches`` (extra_info) launches.
    """
    if rehearsing or DEVICE.type != "cuda":
        benchmark.extra_info["launches"] = 1
        measure(benchmark, launch, cycle([[inputs[0]]]))
        return
    with torch.no_grad():
        for x in inputs:
            launch([x])
        synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for n in range(LAUNCHES):
                launch([inputs[n % len(inputs)]])
    benchmark.extra_info["launches"] = LAUNCHES
    measure(benchmark, lambda _: graph.replay(), cycle([[]]), seconds=KERNEL_SECONDS)
