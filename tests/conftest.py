"""Fixtures and settings that hold for every test."""

import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as photographs

from tests.helpers.error_log import ErrorFile, noted_in

if TYPE_CHECKING:
    from fastmsflow import MSFlow
    from fastmsflow.inference import BatchScorer

# For the processes that tests start: small tensors gain nothing from more threads, and Inductor's own processes import
# more than they compile.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Read when a kernel is decorated, so set before: without a GPU the kernels run in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--errors", type=Path, metavar="FILE", help="write how far every comparison erred, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--errors")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(ErrorFile(path))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU, what only a GPU can show comes first. Of xdist's workers the first begins with it."""
    if torch.cuda.is_available():
        items.sort(key=lambda item: item.get_closest_marker("gpu") is None)


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
def unchecked_integers() -> None:
    """Spares the interpreter a second, 64-bit reckoning of every integer: it takes nearly half of the time.

    No test's tensors reach 32 bits but those of test_kernel_offsets.py, which looks at the result itself.
    """
    if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
        from triton.runtime.interpreter import interpreter_builder as builder

        builder.options = replace(builder.options, sanitize_overflow=False)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills every new buffer with NaN, so that what a kernel leaves unwritten shows."""
    empty = torch.empty

    def nan(*args, **kwargs):
        buffer = empty(*args, **kwargs)
        return buffer.fill_(float("nan")) if buffer.is_floating_point() else buffer

    monkeypatch.setattr(torch, "empty", nan)


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """Writes weights of the tiny extractor, for a command: nothing is fetched."""
    import timm

    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        torch.save(timm.create_model("test_resnet.r160_in1k").state_dict(), path)
    return path


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


@pytest.fixture
def predict_parquet(predict) -> Callable[..., tuple[int, str, str]]:
    """Runs ``fastmsflow predict ARGS --format parquet``, unless another form is asked for."""
    pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'fastmsflow[shards]'")
    return lambda *args, form="parquet", **options: predict(*args, "--format", form, **options)


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
def noise_images(tmp_path_factory) -> Path:
    """A folder of 18 images of 40x36: 00.png to 17.png."""
    folder = tmp_path_factory.mktemp("noise")
    random = np.random.default_rng(0)
    for i in range(18):
        Image.fromarray(random.integers(0, 256, (40, 36, 3), np.uint8)).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="session")
def noise_shards(noise_images: Path, tmp_path_factory) -> Path:
    """Shards of ``noise_images``, four to a shard; not to be written to."""
    pytest.importorskip("webdataset", reason="needs webdataset: pip install 'fastmsflow[shards]'")
    from fastmsflow.data import write_shards

    out = tmp_path_factory.mktemp("noise_shards") / "set"
    write_shards(sorted(noise_images.iterdir()), out, 4)
    return out


@pytest.fixture
def noise_shards_copy(noise_shards: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(noise_shards, tmp_path / "set"))


@pytest.fixture(scope="module")
def calibrated_model(noise_images: Path) -> "MSFlow":
    """A model for 32x32 by which half of ``noise_images`` are defective, and each has a region."""
    from tests.helpers.calibrated import calibrated

    return calibrated(sorted(noise_images.iterdir()), (32, 32))


@pytest.fixture(scope="module")
def checkpoint(calibrated_model: "MSFlow", tmp_path_factory) -> Path:
    """The file of ``calibrated_model``."""
    path = tmp_path_factory.mktemp("model") / "calibrated.safetensors"
    calibrated_model.save(path)
    return path


@pytest.fixture(scope="session")
def brick_tiles(tmp_path_factory) -> Path:
    """A folder of six tiles of 96x80: 0.png to 5.png."""
    folder = tmp_path_factory.mktemp("tiles")
    for i in range(6):
        Image.fromarray(photographs.brick()[i * 70 : i * 70 + 80, 60:156]).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def brick_model(brick_tiles: Path) -> "MSFlow":
    """A model for 64x64 by which three of ``brick_tiles`` are defective, and each has a region."""
    from tests.helpers.calibrated import calibrated

    return calibrated(sorted(brick_tiles.iterdir()), (64, 64))


@pytest.fixture(scope="module")
def brick_checkpoint(brick_model: "MSFlow", tmp_path_factory) -> Path:
    """The file of ``brick_model``."""
    path = tmp_path_factory.mktemp("model") / "calibrated.safetensors"
    brick_model.save(path)
    return path


@pytest.fixture(scope="session")
def batch_arrays() -> list[np.ndarray]:
    """12 images of four sizes in turn; the second, sixth and tenth are of the size of ``batch_model``."""
    random, sizes = np.random.default_rng(0), ((40, 36), (32, 48), (36, 40), (64, 32))
    return [random.integers(0, 256, (*sizes[i % 4], 3), np.uint8) for i in range(12)]


@pytest.fixture(scope="session")
def batch_images(batch_arrays: list[np.ndarray], tmp_path_factory) -> list[Path]:
    """The files of ``batch_arrays``: 00.png to 11.png."""
    folder = tmp_path_factory.mktemp("images")
    for i, array in enumerate(batch_arrays):
        Image.fromarray(array).save(folder / f"{i:02}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="session")
def batch_contents(batch_images: list[Path]) -> list[bytes]:
    """The bytes of ``batch_images``."""
    return [path.read_bytes() for path in batch_images]


@pytest.fixture(scope="module")
def batch_model(batch_images: list[Path]) -> "MSFlow":
    """A model for 32x48 by which half of ``batch_images`` are defective; some have regions, others none."""
    from tests.helpers.calibrated import calibrated

    return calibrated(batch_images, (32, 48), without_region=3)


@pytest.fixture(scope="module")
def batch_checkpoint(batch_model: "MSFlow", tmp_path_factory) -> Path:
    """The file of ``batch_model``."""
    path = tmp_path_factory.mktemp("model") / "calibrated.safetensors"
    batch_model.save(path)
    return path


@pytest.fixture(scope="module")
def scorer(batch_checkpoint: Path) -> "BatchScorer":
    """Scores by ``batch_model`` in float32."""
    from fastmsflow.inference import BatchScorer

    return BatchScorer(batch_checkpoint, dtype="float32", device="cpu").load()


@pytest.fixture(scope="module")
def expected(scorer: "BatchScorer", batch_contents: list[bytes]) -> dict[str, Any]:
    """The results of ``batch_images``."""
    return scorer({"bytes": batch_contents})


@pytest.fixture(scope="session")
def jpeg_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """46 images in two folders; each folder has the same file names."""
    from fastmsflow.data import list_images

    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for i in range(46):
        folder = root / ("day 1", "day2")[i % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 36, 3), np.uint8)).save(folder / f"é.{i // 2:02}.jpg")
    return list_images(root)


@pytest.fixture(scope="session")
def jpeg_shards(jpeg_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of ``jpeg_files``, four to a shard; not to be written to."""
    pytest.importorskip("webdataset", reason="needs webdataset: pip install 'fastmsflow[shards]'")
    from fastmsflow.data import write_shards

    out = tmp_path_factory.mktemp("shards") / "set"
    write_shards(jpeg_files, out, 4)
    return out


@pytest.fixture
def jpeg_shards_copy(jpeg_shards: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(jpeg_shards, tmp_path / "set"))


@pytest.fixture(scope="module")
def no_downloads() -> Iterator[None]:
    """No extractor is pretrained: nothing is fetched."""
    from tests.helpers.small_runs import untrained

    with untrained():
        yield


@pytest.fixture(scope="session")
def two_classes(tmp_path_factory) -> Path:
    """Classes a and b of 48 good training tiles, 10 good and 8 defective test tiles each, without masks."""
    root = tmp_path_factory.mktemp("tiles")
    for name, photograph in (("a", photographs.brick()), ("b", photographs.gravel())):
        for i in range(66):
            pixels = photograph[i * 6 : i * 6 + 80, (i % 3) * 100 : (i % 3) * 100 + 80].copy()
            if i < 48:
                target = root / name / f"train/good/{i:02}.png"
            elif i < 58:
                target = root / name / f"test/good/{i:02}.png"
            else:
                target = root / name / f"test/spot/{i:02}.png"
                pixels[30:50, 30:50] = 255 - pixels[30:50, 30:50]
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(target)
    return root


@pytest.fixture(scope="session")
def runs(two_classes: Path, tmp_path_factory) -> Path:
    """A run's folder for each class, a fifth of the images held out for 10% false alarms."""
    from tests.helpers.small_runs import SMALL, run, untrained

    out = tmp_path_factory.mktemp("runs")
    with untrained():
        for name in ("a", "b"):
            run(
                "train", two_classes, "--class", name, "--out", out / name, *SMALL, "--meta-epochs", 3,
                "--sub-epochs", 1, "--hold-out", 0.2, "--false-alarms", 0.1,
            )  # fmt: skip
    return out
