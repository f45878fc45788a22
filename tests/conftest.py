"""Fixtures and settings that hold for every test."""

import gc
import io
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as photographs

from tests.helpers.error_log import ErrorFile, noted_in
from tests.helpers.frame_memory import with_frame_memory
from tests.helpers.interpreter import hasten_interpreter
from tests.helpers.warm_python import warm_python

# For the processes that tests start: small tensors gain nothing from more threads, and Inductor's own processes import
# more than they compile.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Inductor's scalar code is found and compiled in a third of the time: it tries no vector instructions on a compiler,
# and chooses no tiling. Set the variable to "1" to test its vectorized code.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")
os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")
# A JVM of seconds takes half of the time if it does not optimize what it runs, nor collect garbage in threads.
for name in ("SPARK_SUBMIT_OPTS", "SPARK_LAUNCHER_OPTS"):
    os.environ.setdefault(name, "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")
# Commands that run in pytest's process would have it keep all memory that was ever used, which makes its forks slow.
os.environ.setdefault("GLIBC_TUNABLES", "")
# Read when a kernel is decorated, so set before: without a GPU the kernels run in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


# No garbage is looked for until all tests are collected: imports make a million objects, which stay.
gc.disable()

PYTHON = "FASTMSFLOW_TESTS_PYTHON"
# Their tests fork pytest's process, which is quick only while that is small.
FORKING = {
    "test_ahead_loader.py",
    "test_loaders.py",
    "test_reader_pool.py",
    "test_result_folder.py",
    "test_shards.py",
    "test_shards_training.py",
}
SLOW_FILE = re.compile(r"^pytestmark = (\[\s*)?pytest\.mark\.slow\b", re.MULTILINE)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--errors", type=Path, metavar="FILE", help="write how far every comparison erred, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--errors")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(ErrorFile(path))
    if not hasattr(config, "workerinput"):
        start_warm_python(config)
        if getattr(config.option, "numprocesses", None):
            # This process collects no tests: xdist's workers do.
            gc.enable()
    # xdist would begin with the files of many tests, and end with one long file in one process.
    config.option.loadscopereorder = False


def start_warm_python(config: pytest.Config) -> None:
    """Starts the server of the fixture ``python``: one for all of xdist's processes and for tests that run in its
    programs, which inherit the variable. A path with a space cannot stand in a script's first line."""
    if sys.platform == "linux" and " " not in sys.executable and PYTHON not in os.environ:
        stack = ExitStack()
        config.add_cleanup(stack.close)
        config.add_cleanup(lambda: os.environ.pop(PYTHON, None))
        # Not in TMPDIR: the path of a socket has at most 107 bytes.
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp"))
        os.environ[PYTHON] = str(stack.enter_context(warm_python(Path(folder))))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Spares a run without slow tests the files that are slow as a whole: some import for seconds."""
    if config.option.markexpr != "not slow" or collection_path.suffix != ".py":
        return None
    return True if SLOW_FILE.search(collection_path.read_text()) else None


def pytest_collection_finish() -> None:
    """Looks for no garbage in what imports have made, nor while they make it, and seldom in what tracing makes."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that fork come first, then those with slow tests, and on a GPU what only a GPU can show before them.

    xdist's workers begin with them.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.name not in FORKING, item.path not in slow))
    if torch.cuda.is_available():
        items.sort(key=lambda item: item.get_closest_marker("gpu") is None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> object:
    # This takes the place of pytest's own hook; a plugin with another one, as for reruns, would not be asked.
    runner = item.config.pluginmanager.get_plugin("runner")
    return with_frame_memory(runner.pytest_runtest_protocol, item, nextitem)


@pytest.fixture(autouse=True)
def noted(request: pytest.FixtureRequest) -> Iterator[None]:
    """Keeps how far the test's comparisons erred, for ``--errors``."""
    with noted_in(request.node.user_properties):
        yield


# Of a module: its own fixtures compute too, but benchmarks run in the same session do so as PyTorch comes.
@pytest.fixture(scope="module", autouse=True)
def exact_float32() -> Iterator[None]:
    """Multiplies float32 as it is. On a GPU, PyTorch's convolutions round it to TF32 unless they are told not to."""
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = False
    yield
    for flag, allowed in zip(flags, before, strict=True):
        flag.allow_tf32 = allowed


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors gain nothing from more, and on a shared machine waiting for each other costs them seconds."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def fast_interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
        hasten_interpreter()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills every new buffer with NaN, so that what a kernel leaves unwritten shows."""
    empty = torch.empty

    def nan(*args, **kwargs):
        buffer = empty(*args, **kwargs)
        return buffer.fill_(float("nan")) if buffer.is_floating_point() else buffer

    monkeypatch.setattr(torch, "empty", nan)


@pytest.fixture(scope="session")
def python() -> Path:
    """A Python for programs, which starts in a twentieth of the time; tests/helpers/warm_python.py has its limits."""
    return Path(os.environ.get(PYTHON, sys.executable))


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """Writes weights of the tiny extractor, for a command: nothing is fetched."""
    import timm

    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        torch.save(timm.create_model("test_resnet.r160_in1k").state_dict(), path)
    return path


@pytest.fixture(scope="module")
def no_downloads() -> Iterator[None]:
    """No extractor is pretrained, so that nothing is fetched, and flows are small."""
    from tests.helpers.small_runs import untrained

    with untrained():
        yield


@pytest.fixture(scope="module")
def one_block_flows() -> Iterator[None]:
    """Flows have one block a level unless another number is given: for what does not depend on how many there are."""
    from tests.helpers.small_runs import small_flows

    with small_flows():
        yield


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs ``fastmsflow ARGS`` in this process -> (exit code, all it printed)."""

    # Not at the top: it may bring in kernels, and TRITON_INTERPRET is read then.
    from fastmsflow.__main__ import main as run_main

    def run(*args: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fastmsflow", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as end:
            run_main()
        out, err = capsys.readouterr()
        message = end.value.code if isinstance(end.value.code, str) else ""
        return 1 if message else int(end.value.code or 0), out + err + message

    return run


@pytest.fixture
def predict(monkeypatch, capsys):
    """Runs ``fastmsflow predict ARGS`` in this process -> (exit code, stdout, stderr and the last line)."""
    from fastmsflow.__main__ import main as run_main

    def run(*args: object, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastmsflow", "predict", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as end:
            run_main()
        out, err = capsys.readouterr()
        message = end.value.code if isinstance(end.value.code, str) else ""
        return 1 if message else int(end.value.code or 0), out, err + message

    return run


@pytest.fixture(scope="session")
def mvtec(tmp_path_factory) -> Path:
    """root/tile with 8 training, 4 good and 4 defective test images of 96x96, with masks."""
    root = tmp_path_factory.mktemp("mvtec")
    tile = root / "tile"
    photograph = photographs.brick()
    for folder in ("train/good", "test/good", "test/spot", "ground_truth/spot"):
        (tile / folder).mkdir(parents=True)
    for i in range(16):
        pixels = photograph[i * 24 : i * 24 + 96, 60:156].copy()
        if i < 8:
            target = tile / f"train/good/{i:03}.png"
        elif i < 12:
            target = tile / f"test/good/{i:03}.png"
        else:
            target = tile / f"test/spot/{i:03}.png"
            mask = np.zeros((96, 96), np.uint8)
            mask[30:60, 40:70] = 255
            pixels[mask > 0] = 255 - pixels[mask > 0] // 2
            Image.fromarray(mask).save(tile / f"ground_truth/spot/{i:03}_mask.png")
        Image.fromarray(pixels).save(target)
    return root


@pytest.fixture(scope="session")
def submission_made(tmp_path_factory) -> Path:
    """A folder with a tiny set of MVTec AD 2, set, of the objects can and rice, and calibrated runs for it, runs."""
    from tests.helpers.mvtec_ad_2_runs import write_runs
    from tests.helpers.mvtec_ad_2_tree import write_mvtec_ad_2

    folder = tmp_path_factory.mktemp("submission")
    names = ("can", "rice")
    write_runs(folder / "runs", write_mvtec_ad_2(folder / "set", objects=names), names)
    return folder


@pytest.fixture
def submission_here(submission_made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, a copy of ``submission_made``."""
    shutil.copytree(submission_made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path
