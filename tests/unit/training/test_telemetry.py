"""Tests what is measured of a running training: its speed, what it waits for, a trace of a few steps."""

import csv
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastmsflow import InputError
from fastmsflow.data import ImageSet
from fastmsflow.training import DataConfig, Recipe, train
from fastmsflow.training.features_in_memory import FeaturesInMemory
from fastmsflow.training.lightning_module import MSFlowLightningModule
from tests.helpers.noise_images import noise_set
from tests.helpers.tiny_model import tiny_model


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageSet:
    return noise_set(tmp_path_factory.mktemp("images"), train=12)


RECIPE = Recipe(lr=1e-3, batch_size=2, meta_epochs=1, sub_epochs=3)


def test_speed_and_waiting_are_logged_and_kept_with_the_results(images: ImageSet, tmp_path: Path, monkeypatch) -> None:
    """The time for which a loader sleeps is waited for, however long a busy machine takes for the steps."""
    fetch = FeaturesInMemory.fetch

    def slow(self, numbers: list[int]):
        time.sleep(0.1)
        return fetch(self, numbers)

    monkeypatch.setattr(FeaturesInMemory, "fetch", slow)
    started = time.perf_counter()
    result = train(tiny_model(), images, RECIPE, tmp_path / "run", log_to=["csv"])
    seconds = time.perf_counter() - started
    assert 36 / seconds <= result.speed["images_per_second"] <= 2 / 0.1
    assert 3 * 6 * 0.1 <= waited(result.speed, 3 * 12) < seconds
    assert json.loads((tmp_path / "run/results.json").read_text())["speed"] == result.speed
    (file,) = (tmp_path / "run/logs").rglob("metrics.csv")
    with file.open() as rows:
        logged = [row for row in csv.DictReader(rows) if row.get("images_per_second")]
    assert len(logged) == 3  # epochs, each shorter than a window
    assert all(6 * 0.1 <= waited(row, 12) < seconds for row in logged)


def waited(speed: Mapping[str, float | str], images: int) -> float:
    """Seconds, until ``images`` were learned from; what is logged has six digits."""
    return 1.00001 * float(speed["data_wait"]) * images / float(speed["images_per_second"])


def test_a_fast_loader_is_not_waited_for(images: ImageSet, tmp_path: Path) -> None:
    result = train(tiny_model(), images, RECIPE, tmp_path / "run")
    assert result.speed["data_wait"] < 0.5


def traced(folder: Path) -> tuple[list[int], set[str]]:
    """-> (the steps of a run's trace, from 0; what was done in them)."""
    names = {str(event.get("name")) for event in json.loads((folder / "profile.json").read_text())["traceEvents"]}
    steps = {name for name in names if name.startswith("ProfilerStep#")}
    return sorted(int(name.partition("#")[2]) for name in steps), names - steps


def no_profiler_runs() -> bool:
    return not torch.autograd.profiler._is_profiler_enabled


# Steps in all -> those that are traced.
@pytest.mark.parametrize(("images_used", "steps"), [(12, [5, 6, 7, 8, 9]), (4, [1, 2, 3, 4, 5]), (2, [0, 1, 2])])
def test_a_trace_of_a_few_steps_is_written(
    images_used: int, steps: list[int], images: ImageSet, tmp_path: Path, capfd
) -> None:
    some = replace(images, train=images.train[:images_used], test=())
    train(tiny_model(), some, RECIPE, tmp_path / "run", reading=DataConfig(stream=True), profile=True)
    found, names = traced(tmp_path / "run")
    assert found == steps
    assert any("conv" in name for name in names)
    assert no_profiler_runs()
    if not torch.cuda.is_available():
        assert capfd.readouterr().err == "", "the profiler speaks"


def test_a_trace_that_the_profiler_could_not_write_is_told(images: ImageSet, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", lambda profiler, path: None)
    with pytest.raises(InputError, match=r"profile\.json: was cut short; free some space, or leave out --profile"):
        train(tiny_model(), images, RECIPE, tmp_path / "run", profile=True)


def test_of_an_interrupted_run_what_was_traced_is_written_and_nothing_is_traced_any_more(
    images: ImageSet, tmp_path: Path, monkeypatch
) -> None:
    step = MSFlowLightningModule.training_step

    def pull_the_plug(self, batch, batch_index: int):
        if self.global_step == 7:
            raise InterruptedError
        return step(self, batch, batch_index)

    monkeypatch.setattr(MSFlowLightningModule, "training_step", pull_the_plug)
    with pytest.raises(InterruptedError):
        train(tiny_model(), images, RECIPE, tmp_path / "run", profile=True)
    assert traced(tmp_path / "run")[0] == [5, 6, 7]
    assert no_profiler_runs()


def test_what_is_done_between_batches_is_not_waiting(images: ImageSet, tmp_path: Path, monkeypatch) -> None:
    look = MSFlowLightningModule.on_train_batch_end

    def slow(self, *batch):
        time.sleep(0.1)
        look(self, *batch)

    monkeypatch.setattr(MSFlowLightningModule, "on_train_batch_end", slow)
    result = train(tiny_model(), images, RECIPE, tmp_path / "run")
    assert result.speed["data_wait"] < 0.1
