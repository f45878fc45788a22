"""Options and fixtures of the suite: ``pytest benchmarks --benchmark-only``."""

import gc
import shutil
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from pytest_benchmark.utils import safe_dumps
from torch import nn

from benchmarks import suite_settings
from benchmarks.contestants import CONTESTANTS, Compiled, Contestant
from benchmarks.cpu_contestants import CPU_CONTESTANTS, TorchCompile
from benchmarks.exports import Exports
from benchmarks.interleaved import Entry, TimeRow, Timing, play_back, race
from benchmarks.parity_gate import Reference
from benchmarks.suite_settings import DEVICE, SIZES, Size, environment, footprint, measure
from fastmsflow import MSFlow
from fastmsflow.files import written_aside

LAST = ("training_step", "scoring", "metric", "import")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--size", choices=SIZES, default="default", help="default: the published model; small: for tests")
    parser.addoption("--batches", help="in place of the size's own, e.g. 1,8")
    parser.addoption("--contestant", action="append", help="only this one (may be repeated)")
    parser.addoption(
        "--rows", type=Path, help="a file for the results so far, written anew after each row: an interrupted run's too"
    )
    parser.addoption("--rehearse", action="store_true", help="run all once, without a GPU too: timings mean nothing")


def pytest_configure(config: pytest.Config) -> None:
    suite_settings.rehearsing = config.getoption("--rehearse")
    suite_settings.hasten_interpreter()
    # For the eager contestants.
    torch.backends.cudnn.benchmark = True


def batches_of(config: pytest.Config) -> tuple[int, ...]:
    given = config.getoption("--batches")
    return tuple(map(int, given.split(","))) if given else SIZES[config.getoption("--size")].batches


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kind" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--contestant")
        trains = "training_step" in metafunc.function.__name__
        kinds = [
            kind
            for kind in (*CONTESTANTS, *CPU_CONTESTANTS)
            if (not chosen or kind.name in chosen)
            and (kind.trains or not trains)
            and not (kind.cpu_only and DEVICE.type == "cuda")
        ]
        metafunc.parametrize("kind", kinds, ids=lambda kind: kind.name, indirect=True)
    if "batch" in metafunc.fixturenames:
        metafunc.parametrize("batch", batches_of(metafunc.config), ids=lambda batch: f"batch{batch}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Batch by batch, and of a batch what says most first: an interrupted run has those rows."""
    order = {batch: place for place, batch in enumerate(batches_of(config))}

    def place(item: pytest.Item) -> tuple[bool, int, bool]:
        batch = getattr(item, "callspec", None) and item.callspec.params.get("batch")
        return any(name in item.name for name in LAST), order.get(batch, 0), "end_to_end" in item.name

    items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    result = yield
    path = item.config.getoption("--rows")
    if path is not None:
        _write_rows(item.config, path)
    return result


def _write_rows(config: pytest.Config, path: Path) -> None:
    """Writes the rows in the form of ``--benchmark-json``."""
    session = config._benchmarksession
    if not hasattr(config, "_machine_info"):
        config._machine_info = session.get_machine_info()
    rows = [row for row in session.benchmarks if row.stats.data]
    content = config.hook.pytest_benchmark_generate_json(
        config=config, benchmarks=rows, include_data=False, machine_info=config._machine_info, commit_info={}
    )
    with written_aside(path) as aside:
        aside.write_text(safe_dumps(content))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, None, None]:
    """Interrupted, the row being measured has no times, on which pytest-benchmark would stumble and save nothing."""
    rows = session.config._benchmarksession.benchmarks
    rows[:] = [row for row in rows if row.stats.data]
    return (yield)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info |= environment() | {"rehearsal": suite_settings.rehearsing}


@pytest.fixture(scope="session")
def size(request: pytest.FixtureRequest) -> Size:
    return SIZES[request.config.getoption("--size")]


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
    for name, parameter in result.flow.named_parameters():
        if "global" in name:
            # A log-det that is not the difference of like sums: its error can be told.
            parameter.data.add_(torch.rand_like(parameter))
    return result.to(DEVICE).eval()


@pytest.fixture(scope="session")
def reference(model: MSFlow) -> Reference:
    return Reference(model)


@pytest.fixture(scope="session")
def exports(model: MSFlow, size: Size, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exports]:
    folder = tmp_path_factory.mktemp("exports")
    yield Exports(model, size.grids, folder)
    # More than a gigabyte, of which pytest would keep those of three sessions.
    shutil.rmtree(folder)


@pytest.fixture
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[Contestant]:
    missing = request.param.missing()
    if missing is not None:
        pytest.skip(missing)
    if request.param.gpu_only and DEVICE.type != "cuda" and not suite_settings.rehearsing:
        pytest.skip("at its best on a GPU only")
    if suite_settings.rehearsing and DEVICE.type != "cuda":
        compile_quickly(request.node.callspec.params.get("batch") == SIZES["small"].batches[0], monkeypatch)
    return request.param


def compile_quickly(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU only the flow's inference goes through Inductor, and where ``whole``: the rest would take it minutes.
    Without vectors Inductor takes half of its time."""
    by_inductor = Compiled.compile.__func__
    for kind in (Compiled, TorchCompile):
        monkeypatch.setattr(kind, "options", {**kind.options, "cpp.simdlen": 1})

    def compile_one(kind: type[Compiled], function: Callable, frozen: bool = False) -> Callable:
        is_whole = whole and kind in (Compiled, TorchCompile)
        if is_whole and getattr(function, "__name__", None) == "log_likelihood_maps":
            return by_inductor(kind, function, frozen)
        return torch.compile(function, fullgraph=True, backend="eager")

    monkeypatch.setattr(Compiled, "compile", classmethod(compile_one))


@pytest.fixture
def before() -> int:
    """The GPU's footprint without the contestant."""
    torch._dynamo.reset()
    return footprint()


@pytest.fixture(scope="session")
def races() -> dict[tuple[str, int | None], dict[str, Timing | Exception]]:
    """The durations that were timed in turns, by test and batch."""
    return {}


@pytest.fixture
def time_row(request: pytest.FixtureRequest, benchmark, kind: type[Contestant], races) -> TimeRow:
    """On a GPU a contestant has the machine to itself. On a CPU, which others use too, the first row of a test and
    batch times all contestants in turns, and the others' rows take theirs from it."""
    model, size, exports = (request.getfixturevalue(name) for name in ("model", "size", "exports"))
    before = request.getfixturevalue("before")

    def entry(kind: type[Contestant], enter: Callable[[Contestant], Entry]) -> Entry:
        return enter(kind(model.flow, size.grids, model, exports))

    def note(result: Entry | Timing) -> None:
        gate = result.gate.as_dict()
        benchmark.extra_info |= {"contestant": kind.name, "precision": result.precision, "gate": gate}

    def alone(enter: Callable[[Contestant], Entry]) -> None:
        own = entry(kind, enter)
        note(own)
        measure(benchmark, own.call, own.inputs, before)
        own.gate.require()

    def in_turns(enter: Callable[[Contestant], Entry]) -> None:
        row = row_of(request.node)
        if row not in races:
            races[row] = race({rival.name: partial(entry, rival, enter) for rival in rivals(request.node)})
            # Compiled graphs hold their weights.
            torch._dynamo.reset()
            gc.collect()
        result = races[row].pop(kind.name)
        if isinstance(result, Exception):
            raise result
        note(result)
        play_back(benchmark, result.seconds)
        benchmark.extra_info |= environment()
        result.gate.require()

    return alone if DEVICE.type == "cuda" or kind.gpu_only else in_turns


def row_of(item: pytest.Item) -> tuple[str, int | None]:
    """The test and the batch, whose contestants are rivals."""
    return item.originalname, item.callspec.params.get("batch")


def rivals(item: pytest.Item) -> list[type[Contestant]]:
    """Those that this session times by the same test with the same batch, where they can run."""
    items = [other for other in item.session.items if "time_row" in other.fixturenames]
    kinds = [other.callspec.params["kind"] for other in items if row_of(other) == row_of(item)]
    return [kind for kind in kinds if not kind.gpu_only and kind.missing() is None]
