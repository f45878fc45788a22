"""Options and fixtures of the suite: ``pytest benchmarks --benchmark-only``."""

import importlib.util
from collections.abc import Generator
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks import setting
from benchmarks.contestants import CONTESTANTS, AsShipped, Compiled, Contestant
from benchmarks.gate import check
from benchmarks.setting import DEVICE, SIZES, Size, environment, footprint
from fastmsflow import MSFlow


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--size", choices=SIZES, default="default", help="default: the published model; small: for tests")
    parser.addoption("--batches", help="in place of the size's own, e.g. 1,8")
    parser.addoption(
        "--rehearse", action="store_true", help="run all once, without a GPU too, uncompiled: timings mean nothing"
    )


def pytest_configure(config: pytest.Config) -> None:
    setting.rehearsing = config.getoption("--rehearse")
    # For the eager contestants.
    torch.backends.cudnn.benchmark = True


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, None, None]:
    """Interrupted, the row being measured has no times, on which pytest-benchmark would stumble and save nothing."""
    rows = session.config._benchmarksession.benchmarks
    rows[:] = [row for row in rows if row.stats.data]
    return (yield)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info |= environment() | {"rehearsal": setting.rehearsing}


@pytest.fixture(scope="session")
def size(request: pytest.FixtureRequest) -> Size:
    found = SIZES[request.config.getoption("--size")]
    batches = request.config.getoption("--batches")
    return Size(**vars(found) | {"batches": tuple(map(int, batches.split(",")))}) if batches else found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "batch" in metafunc.fixturenames:
        given = metafunc.config.getoption("--batches")
        size = SIZES[metafunc.config.getoption("--size")]
        metafunc.parametrize("batch", tuple(map(int, given.split(","))) if given else size.batches)


@pytest.fixture(scope="session")
def model(size: Size) -> MSFlow:
    """Random weights, none of them 0: multiplying by that takes less power, and so less time."""
    torch.manual_seed(0)
    result = MSFlow(size.extractor, pretrained=False, image_size=(size.image, size.image), blocks=size.blocks)
    assert result.flow.channels == size.channels
    for norm in result.extractor.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.data.uniform_(0.2, 0.5)
            norm.bias.data.normal_(std=0.1)
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 2)
    return result.to(DEVICE).eval()


@pytest.fixture(params=CONTESTANTS, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[Contestant]:
    """A contestant whose numbers are right."""
    if issubclass(request.param, AsShipped) and importlib.util.find_spec("FrEIA") is None:
        pytest.skip("FrEIA 0.2 is not installed: pip install FrEIA==0.2")
    if request.param.gpu_only and DEVICE.type != "cuda":
        if not request.config.getoption("--rehearse"):
            pytest.skip("at its best on a GPU only")
        for name in ("compile", "compile_frozen"):
            monkeypatch.setattr(Compiled, name, staticmethod(partial(torch.compile, backend="aot_eager")))
    else:
        check(request.param)
    return request.param


@pytest.fixture
def before(model: MSFlow) -> int:
    """The GPU's footprint without the contestant."""
    torch._dynamo.reset()
    return footprint()


@pytest.fixture
def contestant(kind: type[Contestant], model: MSFlow, size: Size, before: int) -> Contestant:
    return kind(model.flow, size.grids, model)
