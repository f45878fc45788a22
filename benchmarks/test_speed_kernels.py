"""The chip's own limits, every kernel beside them, and the kernels' convolution beside the vendor's."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.setting import DEVICE, SIZES, Size, measure, measure_launches, rotated
from fastmsflow.benchmarking import Case, cases, tensors
from fastmsflow.kernels import conv3x3
from fastmsflow.kernels.launch import INTERPRETED

BATCH = 8
runs_kernels = pytest.mark.skipif(DEVICE.type != "cuda" and not INTERPRETED, reason="kernels run on a GPU")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kernel" in metafunc.fixturenames:
        size = SIZES[metafunc.config.getoption("--size")]
        named = cases(size.kernel_levels, BATCH, size.image, torch.device("meta"))
        chosen = [i for i, case in enumerate(named) if case.arithmetic == "bfloat16" or case.tiles.endswith("_score")]
        metafunc.parametrize("kernel", chosen)


@pytest.fixture(scope="module")
def all_cases(size: Size) -> list[Case]:
    return list(cases(size.kernel_levels, BATCH, size.image, DEVICE))


@pytest.mark.benchmark(group="the chip")
def test_matrix_product(benchmark, size: Size) -> None:
    """bfloat16, 8192 x 8192 on a GPU: what no product exceeds."""
    n = 8192 if DEVICE.type == "cuda" else 512
    benchmark.extra_info |= {"flops": 2 * n**3}
    measure(benchmark, lambda x: x[0] @ x[1], rotated(lambda: _bfloat16((n, n), (n, n))))


@pytest.mark.benchmark(group="the chip")
def test_copy(benchmark, size: Size) -> None:
    """Reads and writes: what no pass over data exceeds."""
    n = 1 << (30 if DEVICE.type == "cuda" else 22)
    benchmark.extra_info |= {"bytes": 2 * 2 * n}
    measure(benchmark, lambda x: x[1].copy_(x[0]), rotated(lambda: _bfloat16((n,), (n,))))


@runs_kernels
@pytest.mark.benchmark(group="kernels")
def test_kernel(benchmark, all_cases: list[Case], kernel: int) -> None:
    case = all_cases[kernel]
    moved = sum(x.numel() * x.element_size() for x in tensors([case.launch.args, case.launch()]))
    benchmark.extra_info |= {"case": f"{case.tiles}: {case.name}", "flops": case.flops, "bytes": moved}
    # Where its tensors fit the cache they stay in it, as they do between neighbouring kernels of the flow.
    measure_launches(benchmark, lambda _: case.launch(), [torch.empty(1, device=DEVICE)])


@runs_kernels
@pytest.mark.benchmark(group="convolutions, own and the vendor's")
@pytest.mark.parametrize("whose", ["own", "vendor's"])
@pytest.mark.parametrize("which", ["first", "second", "fusion head"])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_convolution(benchmark, size: Size, level: int, which: str, whose: str) -> None:
    """The nine shapes that most of the flow's time goes to."""
    channels, height = size.kernel_levels[level]
    width = channels // 2 + 64
    inputs, outputs = {
        "first": (channels // 2, width),
        "second": (width, channels),
        "fusion head": (channels // 2, channels),
    }[which]
    flops = 18 * BATCH * height * height * inputs * outputs
    benchmark.extra_info |= {"case": f"level {level}, {which}", "whose": whose, "flops": flops}
    weight = _bfloat16((outputs, inputs, 3, 3))[0].contiguous(memory_format=torch.channels_last)

    def convolve(x: list[Tensor]) -> Tensor:
        return conv3x3.conv3x3(x[0], weight, None, "ieee") if whose == "own" else F.conv2d(x[0], weight, padding=1)

    shape = (BATCH, inputs, height, height)
    expected, got = (F.conv2d(x := _image(shape), weight, padding=1).float(), convolve([x]).float())
    assert (got - expected).abs().max() <= 2e-2 * expected.abs().max(), "not timed: it computes something else"
    # Twice the cache and more, one after the other.
    measure_launches(benchmark, convolve, [_image(shape) for _ in range(8)])


def _image(shape: tuple[int, ...]) -> Tensor:
    return _bfloat16(shape)[0].contiguous(memory_format=torch.channels_last)


def _bfloat16(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for shape in shapes]
