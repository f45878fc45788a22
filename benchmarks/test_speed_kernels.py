"""The chip's own limits, every kernel beside them, and the kernels' convolutions beside the vendor's."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.parity_gate import Gate, error
from benchmarks.suite_settings import DEVICE, SIZES, Size, measure, measure_launches, rotated
from fastmsflow.benchmarking import CONDITION, KernelCase, kernel_cases, operation, tensors
from fastmsflow.kernels import configs, conv3x3
from fastmsflow.kernels.conv3x3_layer_norm import fuses_layer_norm
from fastmsflow.kernels.launch import INTERPRETED, ProductTile
from tests.helpers.tolerances import OPERATION

# float16 as in inference, bfloat16 as in training.
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
TRAINING = ("backward", "gradient", "training", "inverse", "conv3x3_weight")
# The kernel behind each convolution with what follows it, see fastmsflow.kernels.configs.KINDS.
FUSED = {
    "conv3x3_layer_norm": "conv3x3_layer_norm",
    "conv3x3_coupling": "conv3x3_coupling",
    "conv3x3_input_gradient": "conv3x3",
    "conv3x3_weight_gradient": "conv3x3_weight",
}
VENDORS = "vendor's"
runs_kernels = pytest.mark.skipif(DEVICE.type != "cuda" and not INTERPRETED, reason="kernels run on a GPU")


def contenders(kernel: str) -> dict[str, ProductTile | None]:
    """The vendor's convolution, and the kernels' own by each tile that is tried, as rows call them."""
    tiles = (configs.product_tile(kernel, DEVICE), *configs.PRODUCT_CANDIDATES[kernel])
    return {VENDORS: None} | {f"own {t.m}x{t.n}x{t.k}, {t.warps} warps, {t.stages} stages": t for t in tiles}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    size = SIZES[metafunc.config.getoption("--size")]
    if "nine" in metafunc.fixturenames:
        levels = range(len(size.kernel_levels))
        places = [(level, which) for level in levels for which in ("first", "second", "fusion head")]
        rows = [(*place, whose) for place in places for whose in contenders("conv3x3")]
        metafunc.parametrize("nine", rows, ids=lambda row: f"level {row[0]}, {row[1]}, {row[2]}")
    if "fused" in metafunc.fixturenames:
        fuses = [fuses_layer_norm(channels // 2 + CONDITION) for channels, _ in size.kernel_levels]
        rows = [
            (kind, level, whose)
            for kind in FUSED
            for level in range(len(size.kernel_levels))
            if kind != "conv3x3_layer_norm" or fuses[level]
            for whose in contenders(FUSED[kind])
        ]
        metafunc.parametrize("fused", rows, ids=lambda row: f"{row[0]}, level {row[1]}, {row[2]}")
    if "kernel" in metafunc.fixturenames:
        rows = [(name, index, case) for name in DTYPES for index, case in enumerate(cases_on_meta(name, size))]
        rows = [row for row in rows if is_timed(row[2], row[0])]
        metafunc.parametrize("kernel", rows, ids=lambda row: f"{row[0]}, {row[2].tiles}, {row[2].name}")


def cases_on_meta(dtype: str, size: Size) -> list[KernelCase]:
    return list(kernel_cases(size.kernel_levels, 1, size.image, torch.device("meta"), dtypes=[DTYPES[dtype]]))


def is_timed(case: KernelCase, dtype: str) -> bool:
    """Inference in float16, and in bfloat16 what training has besides."""
    training = any(word in f"{case.tiles} {case.name}" for word in TRAINING)
    return training == (dtype == "bfloat16")


@cache
def cases_of(dtype: str, batch: int, size: Size) -> list[KernelCase]:
    return list(kernel_cases(size.kernel_levels, batch, size.image, DEVICE, dtypes=[DTYPES[dtype]]))


@pytest.mark.benchmark(group="the chip")
def test_matrix_product(benchmark) -> None:
    """bfloat16, 8192 x 8192 on a GPU: what no product exceeds."""
    n = 8192 if DEVICE.type == "cuda" else 512
    benchmark.extra_info |= {"flops": 2 * n**3}
    measure(benchmark, lambda x: x[0] @ x[1], rotated(lambda: [random(n, n), random(n, n)]))


@pytest.mark.benchmark(group="the chip")
def test_copy(benchmark) -> None:
    """Reads and writes: what no pass over data exceeds."""
    n = 1 << (30 if DEVICE.type == "cuda" else 22)
    benchmark.extra_info |= {"bytes": 2 * 2 * n}
    measure(benchmark, lambda x: x[1].copy_(x[0]), rotated(lambda: [random(n), random(n)]))


@runs_kernels
@pytest.mark.benchmark(group="convolutions, own and the vendor's")
def test_convolution(benchmark, size: Size, batch: int, nine: tuple[int, str, str]) -> None:
    """The nine shapes that most of the flow's time goes to, in float16."""
    level, which, whose = nine
    channels, height = size.kernel_levels[level]
    width = channels // 2 + CONDITION
    inputs, outputs = {
        "first": (channels // 2, width),
        "second": (width, channels),
        "fusion head": (channels // 2, channels),
    }[which]
    weight = image(torch.float16, outputs, inputs, 3, 3).div_(3 * inputs**0.5)
    shape = (batch, inputs, height, height)

    def convolve(x: list[Tensor]) -> Tensor:
        if whose == VENDORS:
            return F.conv2d(x[0], weight, padding=1)
        return conv3x3.conv3x3(x[0], weight, None, "ieee")

    benchmark.extra_info |= {"case": f"level {level}, {which}"} | named("conv3x3", whose, batch)
    benchmark.extra_info |= {"kind": "conv3x3", "pixels": batch * height * height, "outputs": outputs}
    benchmark.extra_info["flops"] = 18 * batch * height * height * inputs * outputs
    with torch.no_grad(), contender("conv3x3", "conv3x3", whose):
        x = image(torch.float16, *shape)
        gate = gate_of(convolve([x]), F.conv2d(x.float(), weight.float(), padding=1))
        benchmark.extra_info["gate"] = gate.as_dict()
        # Twice the cache and more, one after the other.
        measure_launches(benchmark, convolve, [image(torch.float16, *shape) for _ in range(8)])
    gate.require()


@runs_kernels
@pytest.mark.benchmark(group="convolutions and what follows them, own and the vendor's")
def test_fused_convolution(benchmark, size: Size, batch: int, fused: tuple[str, int, str]) -> None:
    """A convolution fused with what follows it beside the vendor's and a kernel of its own; a gradient beside the
    vendor's. What is faster goes into the table of convolutions."""
    kind, level, whose = fused
    channels, height = size.kernel_levels[level]
    dtype = torch.bfloat16 if "gradient" in kind else torch.float16
    torch.manual_seed(0)
    call = operation(kind, channels, height, DEVICE, batch=batch, dtype=dtype)
    outputs = channels // 2 + CONDITION if kind == "conv3x3_layer_norm" else channels
    benchmark.extra_info |= {"case": f"{kind}, level {level}"} | named(FUSED[kind], whose, batch)
    benchmark.extra_info |= {"kind": kind, "pixels": batch * height * height, "outputs": outputs}
    with torch.no_grad():
        with contender(kind, FUSED[kind], VENDORS):
            expected = next(tensors(call()))
        with contender(kind, FUSED[kind], whose):
            gate = gate_of(next(tensors(call())), expected)
            benchmark.extra_info["gate"] = gate.as_dict()
            measure_launches(benchmark, lambda _: call(), [torch.empty(1, device=DEVICE)])
    gate.require()


@runs_kernels
@pytest.mark.benchmark(group="kernels")
def test_kernel(benchmark, size: Size, batch: int, kernel: tuple[str, int, KernelCase]) -> None:
    """The gate of a kernel's row is what benchmarks/smoke.py found of the kernel."""
    dtype, index, _ = kernel
    case = cases_of(dtype, batch, size)[index]
    moved = sum(x.numel() * x.element_size() for x in tensors([case.launch.args, case.launch.keywords, case.launch()]))
    benchmark.extra_info |= {"case": f"{case.tiles}: {case.name}", "kernel": case.tiles, "batch": batch}
    benchmark.extra_info |= {"arithmetic": case.arithmetic, "flops": case.flops, "bytes": moved}
    # Where its tensors fit the cache they stay in it, as they do between neighbouring kernels of the flow.
    measure_launches(benchmark, lambda _: case.launch(), [torch.empty(1, device=DEVICE)])


@contextmanager
def contender(kind: str, kernel: str, whose: str) -> Iterator[None]:
    """Sets the convolution of ``kind`` in the block: the vendor's, or ``kernel`` by the tile that ``whose`` names."""
    size = contenders(kernel)[whose]
    with ExitStack() as stack:
        stack.enter_context(configs.force_convolution(kind, size is not None, DEVICE))
        if size is not None:
            stack.enter_context(configs.force_tile(kernel, size, DEVICE))
        yield


def named(kernel: str, whose: str, batch: int) -> dict[str, Any]:
    """Describes the contender of a contest's row."""
    size = contenders(kernel)[whose]
    return {"whose": whose, "kernel": kernel, "tile": size and asdict(size), "batch": batch}


def gate_of(ours: Tensor, expected: Tensor) -> Gate:
    """Both may have been rounded when stored."""
    return Gate({"result": error(ours, expected)}, 2 * OPERATION[str(ours.dtype)[6:]])


def image(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype, memory_format=torch.channels_last)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
