"""A run that is killed and resumed equals, to the bit, one that was not; and the folder it writes into."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastmsflow import MSFlow
from fastmsflow.data import ImageSet
from fastmsflow.training import Recipe, checkpointing, train
from tests.helpers.folder_listing import names_in
from tests.helpers.noise_images import noise_set
from tests.helpers.processes import CONTEXT
from tests.helpers.tiny_model import tiny_model

pytestmark = pytest.mark.slow

KILLS = 10
RECIPE = Recipe(lr=1e-3, batch_size=2, meta_epochs=2, sub_epochs=2, hold_out=0.25, precision="bf16-mixed")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageSet:
    return noise_set(tmp_path_factory.mktemp("images"), train=12)


def run(images: ImageSet, out: Path, resume: bool = False, recipe: Recipe = RECIPE) -> None:
    """Runs in a process of its own."""
    torch.set_num_threads(1)
    checkpointing.SAVE_SECONDS = 0.0  # the state after every step
    train(tiny_model(standardise=True), images, recipe, out, resume=resume)


def started(images: ImageSet, out: Path, resume: bool) -> multiprocessing.process.BaseProcess:
    process = CONTEXT.Process(target=run, args=(images, out, resume))
    process.start()
    return process


def results_of(out: Path) -> dict:
    results = json.loads((out / "results.json").read_text())
    return {key: value for key, value in results.items() if key not in ("seconds", "speed", "command")}


@pytest.fixture(scope="module")
def unbroken(images: ImageSet, tmp_path_factory) -> tuple[Path, float]:
    """The folder of a run that nobody disturbed, and how long it took."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    began = time.perf_counter()
    process = started(images, out, False)
    process.join()
    assert process.exitcode == 0
    return out, time.perf_counter() - began


def test_killed_at_10_random_moments_and_resumed_it_ends_as_if_never_disturbed(
    images: ImageSet, unbroken: tuple[Path, float], tmp_path: Path
) -> None:
    expected, seconds = unbroken
    out, rng = tmp_path / "run", random.Random(7)
    kills = restarts = 0
    while kills < KILLS:
        resume, began = out.exists(), time.perf_counter()
        process = started(images, out, resume)
        process.join(rng.uniform(0, seconds))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            # Whatever is there is whole.
            for path in out.glob("[!.]*.safetensors"):
                MSFlow.load(path)
        elif not resume:
            # On a busy machine the undisturbed run may have taken longer, and few would be killed within theirs.
            seconds = time.perf_counter() - began
        if (out / "results.json").exists():
            end(images, out, expected)
            out = tmp_path / f"run{(restarts := restarts + 1)}"
        else:
            assert process.exitcode == -signal.SIGKILL
    end(images, out, expected)


def end(images: ImageSet, out: Path, expected: Path) -> None:
    """A last start: a run that had finished when it was killed, or that ended, says so and tidies up."""
    finished = (out / "results.json").exists()
    process = started(images, out, resume=out.exists())
    process.join()
    assert process.exitcode == int(finished)
    assert_the_same(expected, out)


def assert_the_same(expected: Path, out: Path) -> None:
    assert results_of(out) == results_of(expected)
    assert names_in(out) == names_in(expected)
    for path in expected.glob("[!.]*.safetensors"):
        given = load_file(out / path.name)
        assert all(torch.equal(given[key], value) for key, value in load_file(path).items()), path.name
