"""train --class all: every class as if it had been trained alone, whatever happens to the others or in between."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file
from skimage import data as photographs
from torch.utils.data import DataLoader

from fastmsflow import MSFlow
from fastmsflow.data import ahead_loader
from fastmsflow.data.class_selection import is_every_class
from fastmsflow.distributed.process_group import RANK_VARIABLES, ProcessGroup
from fastmsflow.files import LOCK_FILE, Busy
from fastmsflow.training.class_queue import FAILED_FILE, train_each
from fastmsflow.training.every_class import ModelFactory
from fastmsflow.training.run_directory import RESULTS_FILE
from tests.helpers.folder_listing import names_in
from tests.helpers.paths import ROOT
from tests.helpers.processes import CONTEXT

pytestmark = pytest.mark.slow

KILLS = 4
RECIPE = ("--lr", 1e-3, "--meta-epochs", 2, "--sub-epochs", 1, "--false-alarms", 0.5, "--standardise")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Classes a and b of 10 training, 3 good and 3 defective test images, with masks."""
    root = tmp_path_factory.mktemp("images")
    for name, photograph in (("a", photographs.brick()), ("b", photographs.gravel())):
        for part in ("train/good", "test/good", "test/spot", "ground_truth/spot"):
            (root / name / part).mkdir(parents=True)
        for i in range(16):
            pixels = photograph[i * 6 : i * 6 + 64, :64].copy()
            part = "train/good" if i < 10 else "test/good" if i < 13 else "test/spot"
            if i >= 13:
                mask = np.zeros((64, 64), np.uint8)
                mask[20:40, 20:40] = 255
                pixels[mask > 0] = 255 - pixels[mask > 0]
                Image.fromarray(mask).save(root / name / f"ground_truth/spot/{i:02}_mask.png")
            Image.fromarray(pixels).save(root / name / part / f"{i:02}.png")
    return root


def arguments(images: Path, category: str, out: Path, weights: Path, *more: object) -> tuple[object, ...]:
    model = ("--extractor", "test_resnet.r160_in1k", "--extractor-weights", weights, "--image-size", 32)
    return ("train", images, "--class", category, "--out", out, *model, *RECIPE, *more)


def run(*args: object) -> None:
    """Outside of a test's own ``command``."""
    from fastmsflow.cli import app

    app([*map(str, args)], standalone_mode=False)


@pytest.fixture(scope="module")
def alone(images: Path, weights: Path, tmp_path_factory) -> Path:
    """The folders of a run of each class by its name."""
    out = tmp_path_factory.mktemp("alone")
    for name in ("a", "b"):
        run(*arguments(images, name, out / name, weights))
    return out


@pytest.fixture(scope="module")
def together(images: Path, weights: Path, tmp_path_factory) -> Path:
    """Runs ``--class all`` and returns what it leaves."""
    out = tmp_path_factory.mktemp("together") / "runs"
    run(*arguments(images, "all", out, weights))
    return out


def results_of(out: Path) -> dict:
    results = json.loads((out / RESULTS_FILE).read_text())
    return {key: value for key, value in results.items() if key not in ("seconds", "speed", "command")}


def scores_of(out: Path) -> list[list[str]]:
    with (out / "scores.csv").open() as file:
        return [[Path(image).name, *values] for image, *values in csv.reader(file)]


def assert_the_same(given: Path, expected: Path, besides: frozenset[str] = frozenset()) -> None:
    assert results_of(given) == results_of(expected)
    assert names_in(given) - besides == names_in(expected)
    assert scores_of(given) == scores_of(expected)
    assert (given / "training.png").read_bytes() == (expected / "training.png").read_bytes()
    for path in expected.glob("*.safetensors"):
        tensors = load_file(given / path.name)
        assert all(torch.equal(tensors[key], value) for key, value in load_file(path).items()), path.name


def test_the_processes_that_read_images_are_started_once_for_all_classes(
    images: Path, weights: Path, tmp_path: Path, monkeypatch
) -> None:
    started = []

    def counted(*given: object, **options: object) -> DataLoader:
        started.append(options["num_workers"])
        return DataLoader(*given, **options)

    monkeypatch.setattr(ahead_loader, "DataLoader", counted)
    run(*arguments(images, "all", tmp_path / "runs", weights, "--stream", "--workers", 1))
    assert started == [1]


@pytest.mark.parametrize("name", ["a", "b"])
def test_each_class_is_trained_as_if_alone(name: str, together: Path, alone: Path) -> None:
    assert_the_same(together / name, alone / name)
    config, expected = (yaml.safe_load((folder / name / "config.yaml").read_text()) for folder in (together, alone))
    assert config == {**expected, "out": str(together / name)}


def test_the_table_is_what_evaluate_finds(together: Path, images: Path, command, tmp_path: Path) -> None:
    code, _ = command("evaluate", together, images, "--class", "all", "--out", tmp_path, "--quiet")
    assert code == 0
    rows, expected = (json.loads((folder / "metrics.json").read_text()) for folder in (together, tmp_path))
    assert [row["class"] for row in rows] == ["a"] * 3 + ["b"] * 3 + ["mean"] * 3
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for key, value in row.items():
            assert value == (pytest.approx(other[key], rel=1e-4) if isinstance(value, float) else other[key]), key
    with (together / "metrics.csv").open() as file:
        assert [row["class"] for row in csv.DictReader(file)] == [row["class"] for row in rows]
    mean = next(row for row in rows if row["class"] == "mean" and row["checkpoint"] == "last")
    cells = [f"{mean[key]:.4f}" for key in ("image_auroc_absolute", "pixel_auroc", "aupro", "f1")]
    assert f"|  | last | {' | '.join(cells)} |  |" in (together / "summary.md").read_text()


def test_a_class_that_fails_is_named_and_tried_again_and_the_others_are_there(
    images: Path, weights: Path, alone: Path, command, tmp_path: Path
) -> None:
    shutil.copytree(images, tmp_path / "images")
    bad = tmp_path / "images/a/train/good/03.png"
    bad.write_bytes(b"no image")
    args = arguments(tmp_path / "images", "all", tmp_path / "runs", weights)
    code, text = command(*args)
    assert code == 1
    assert sum(line.startswith(f"a: failed: {bad}") for line in text.splitlines()) == 2  # at once, and at the end
    assert text.strip().endswith("1 of 2 classes failed; the same command tries them again")
    assert names_in(tmp_path / "runs/a") == {FAILED_FILE}
    assert str(bad) in json.loads((tmp_path / "runs/a" / FAILED_FILE).read_text())["reason"]
    assert str(bad) in (tmp_path / "runs/summary.md").read_text()
    assert_the_same(tmp_path / "runs/b", alone / "b")
    rows = json.loads((tmp_path / "runs/metrics.json").read_text())
    assert {row["class"] for row in rows} == {"b"}  # a mean is of all classes

    shutil.copy(images / "a/train/good/03.png", bad)
    code, text = command(*args, "--json")
    assert code == 0
    assert json.loads(text)["failed"] == {}
    assert list(json.loads(text)["seconds"]) == ["a", "b"]
    assert_the_same(tmp_path / "runs/a", alone / "a")


def test_finished_classes_are_skipped_and_runs_of_other_settings_refused(
    images: Path, weights: Path, together: Path, command
) -> None:
    before = {path: path.read_bytes() for path in together.glob("*/*")}
    table, _, line = (together / "summary.md").read_text().rpartition("\n\n")
    code, text = command(*arguments(images, "all", together, weights))
    assert code == 0
    again, _, now = (together / "summary.md").read_text().rpartition("\n\n")
    assert again == table
    assert line.partition(" in ")[0] == now.partition(";")[0] and "; 2 finished before, the last call took" in now
    assert [line for line in text.splitlines() if "skipped" in line] == [f"{n}: finished, skipped" for n in "ab"]
    code, text = command(*arguments(images, "all", together, weights, "--lr", 5e-4, "--feature-cache", together / "f"))
    assert code == 1
    message = f"{together / 'a'}: holds a finished run of other settings: recipe.lr was 0.001, is 0.0005; cache_dtype"
    assert message in text.strip().splitlines()[-1]
    assert {path: path.read_bytes() for path in together.glob("*/*")} == before


def test_an_interrupted_run_of_other_settings_is_refused_before_any_class_begins(
    images: Path, weights: Path, alone: Path, command, tmp_path: Path
) -> None:
    shutil.copytree(alone / "b", tmp_path / "b")
    (tmp_path / "b" / RESULTS_FILE).unlink()
    settings = {"recipe": {"lr": 1.0}}
    (tmp_path / "b/state-settings.json").write_text(json.dumps(settings))
    code, text = command(*arguments(images, "all", tmp_path, weights))
    assert code == 1
    assert f"{tmp_path / 'b'}: to be resumed, a run needs the settings that it began with: recipe.lr was 1.0" in text
    assert names_in(tmp_path) == {"b"}


def test_a_set_without_classes_is_one_line(images: Path, weights: Path, command, tmp_path: Path) -> None:
    code, text = command(*arguments(images / "a", "all", tmp_path / "runs", weights))
    assert code == 1
    assert f"{images / 'a'}: holds no classes" in text.strip().splitlines()[-1]


def test_all_of_elpv_is_a_class() -> None:
    assert not is_every_class("elpv", "all")
    assert is_every_class("textures", "all")


def test_two_processes_share_the_classes_out(
    images: Path, weights: Path, alone: Path, python: Path, tmp_path: Path
) -> None:
    shutil.copytree(images, tmp_path / "images")
    shutil.copytree(images / "b", tmp_path / "images/c")
    bad = tmp_path / "images/c/train/good/03.png"
    bad.write_bytes(b"no image")
    more = ("--devices", 2, "--logger", "csv", "--json")
    args = arguments(tmp_path / "images", "all", tmp_path / "runs", weights, *more)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [python, "-m", "fastmsflow", *map(str, args)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout)
    assert str(bad) in told["failed"]["c"]
    assert list(told["seconds"]) == ["a", "b"]
    assert f"c: failed: {bad}" in done.stderr
    for name in ("a", "b"):
        assert_the_same(tmp_path / "runs" / name, alone / name, frozenset({"logs"}))
        # Where Lightning takes a process for a second one, it logs nothing.
        with (tmp_path / "runs" / name / "logs/csv/version_0/metrics.csv").open() as file:
            assert sum(bool(row["nll"]) for row in csv.DictReader(file)) == 4


def test_features_are_cached_for_each_class(images: Path, weights: Path, command, tmp_path: Path) -> None:
    cache = tmp_path / "features"
    code, _ = command(*arguments(images, "all", tmp_path / "runs", weights, "--feature-cache", cache, "--workers", 1))
    assert code == 0
    assert names_in(cache) == {"a", "b"}
    config = yaml.safe_load((tmp_path / "runs/b/config.yaml").read_text())
    assert config["feature-cache"] == str(cache / "b")


def killable(args: tuple[object, ...]) -> None:
    """Runs in a process of its own."""
    torch.set_num_threads(1)
    run(*args, "--quiet")


def test_killed_at_random_moments_and_started_again_it_ends_as_if_never_disturbed(
    images: Path, weights: Path, alone: Path, tmp_path: Path
) -> None:
    args = arguments(images, "all", tmp_path / "runs", weights)
    rng = random.Random(3)
    kills = 0
    while not (tmp_path / "runs/summary.md").exists():
        process = CONTEXT.Process(target=killable, args=(args,))
        process.start()
        process.join(rng.uniform(0.5, 2.5) if kills < KILLS else None)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0
    assert kills
    for name in ("a", "b"):
        assert_the_same(tmp_path / "runs" / name, alone / name)


def finish(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULTS_FILE).touch()


def test_an_error_that_nobody_expected_stops_one_class_only(tmp_path: Path) -> None:
    told: list[tuple[str, str]] = []

    def work(name: str) -> None:
        if name == "a":
            raise RuntimeError("first line\nsecond line")
        finish(tmp_path / name)

    reasons = train_each(tmp_path, ["a", "b"], work, lambda name, why: told.append((name, why)))
    assert reasons == {"a": "RuntimeError: second line"}
    assert told == [("a", "RuntimeError: second line")]
    assert (tmp_path / "b" / RESULTS_FILE).exists()
    assert "in work" in "".join(json.loads((tmp_path / "a" / FAILED_FILE).read_text())["traceback"])


def test_an_interruption_stops_everything(tmp_path: Path) -> None:
    def work(name: str) -> None:
        seen.append(name)
        raise KeyboardInterrupt

    seen: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        train_each(tmp_path, ["a", "b"], work, lambda name, why: None)
    assert seen == ["a"]


def test_the_first_process_waits_for_what_another_is_at_and_the_others_do_not(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    done: list[str] = []

    def work(name: str) -> None:
        done.append(name)
        finish(tmp_path / name)

    lock = FileLock(tmp_path / "a" / LOCK_FILE, thread_local=False)
    with lock:
        assert train_each(tmp_path, ["a", "b"], work, lambda name, why: None, rank=1, size=2) == {}
        assert done == ["b"]
        first = threading.Thread(target=train_each, args=(tmp_path, ["a", "b"], work, lambda name, why: None))
        first.start()
        time.sleep(0.2)
        assert first.is_alive()
    # The other one ended without having finished it.
    first.join(10)
    assert done == ["b", "a"]


def test_a_class_that_another_process_takes_first_has_not_failed(tmp_path: Path) -> None:
    def work(name: str) -> None:
        finish(tmp_path / name)
        raise Busy("another process is writing there")

    assert train_each(tmp_path, ["a"], work, lambda name, why: pytest.fail(why)) == {}


def test_a_fresh_model_is_as_new_after_another_was_trained() -> None:
    sizes: list[tuple[int, int]] = []

    def build(size: tuple[int, int]) -> MSFlow:
        sizes.append(size)
        return MSFlow("test_resnet.r160_in1k", False, size, blocks=(1, 1, 1))

    torch.manual_seed(5)
    expected, number = build((64, 64)), torch.rand(1)
    models = ModelFactory(build, 5)
    for size in ((64, 64), (32, 32), (64, 64)):
        model = models.new(size)
        assert torch.equal(torch.rand(1), number)
        assert all(torch.equal(value, expected.state_dict()[key]) for key, value in model.state_dict().items())
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(1)
    assert sizes == [(64, 64), (64, 64), (32, 32)]


@pytest.mark.parametrize(
    ("visible", "there", "own"), [(None, 2, "1"), (None, 0, None), ("4,GPU-5", 8, "GPU-5"), ("", 8, "")]
)
def test_processes_that_share_runs_out_look_like_one_each_on_a_gpu_of_its_own(
    visible: str | None, there: int, own: str | None, monkeypatch
) -> None:
    for name, value in zip(RANK_VARIABLES, "1212", strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    joined: list[ProcessGroup] = []
    monkeypatch.setattr(ProcessGroup, "join", lambda world: joined.append(world))
    ProcessGroup.here().join_apart()
    assert joined == [ProcessGroup(1, 2, 0, 1)]
    assert ProcessGroup.here() == ProcessGroup()
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == own
    assert "TORCHELASTIC_RUN_ID" not in os.environ
