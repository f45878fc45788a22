"""SIGTERM: a run keeps its state within an epoch, says so by its exit code, and goes on with the next step."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastmsflow import MSFlow
from fastmsflow.data import ImageSet, ShardSet, write_shards
from fastmsflow.errors import Preempted
from fastmsflow.training import DataConfig, Recipe, train
from fastmsflow.training.lightning_module import MSFlowLightningModule
from tests.helpers.noise_images import noise_set
from tests.helpers.processes import CONTEXT

pytestmark = pytest.mark.slow

SIGNALS = 4
PREEMPTED = 75
RECIPE = Recipe(lr=1e-3, batch_size=2, meta_epochs=2, sub_epochs=1, hold_out=0.25)


def run(images: ImageSet | ShardSet, out: Path, resume: bool, steps: Path, data_config: DataConfig) -> None:
    """Trains in a process, and a group, of its own; each step of training leaves a line in ``steps``."""
    os.setsid()
    # As where the training is a process that was not forked itself: a server of its own would import all once more.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    step = MSFlowLightningModule.training_step

    def noted(self, batch, batch_index):
        loss = step(self, batch, batch_index)
        with steps.open("a") as file:
            file.write(f"{self.current_epoch} {sorted(batch[1])}\n")
        time.sleep(0.02)
        return loss

    MSFlowLightningModule.training_step = noted
    torch.manual_seed(0)
    model = MSFlow("test_resnet.r160_in1k", pretrained=False, image_size=(32, 32), blocks=(1, 1, 1), standardise=True)
    try:
        train(model, images, RECIPE, out, reading=data_config, resume=resume)
    except Preempted:
        sys.exit(PREEMPTED)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageSet:
    return noise_set(tmp_path_factory.mktemp("images"), train=24)


@pytest.fixture(scope="module")
def shards(images: ImageSet, tmp_path_factory) -> ShardSet:
    where = tmp_path_factory.mktemp("shards")
    write_shards([sample.image for sample in images.train], where, images_per_shard=4)
    return ShardSet.from_source(str(where))


@pytest.mark.parametrize("way", ["kept", "streamed", "shards"])
def test_after_sigterm_not_one_step_is_repeated_and_the_run_ends_as_if_undisturbed(
    way: str, images: ImageSet, shards: ShardSet, tmp_path: Path
) -> None:
    given = shards if way == "shards" else images
    data_config = {
        "kept": DataConfig(),
        "streamed": DataConfig(workers=1, stream=True),
        "shards": DataConfig(workers=1),
    }[way]

    def started(out: Path, resume: bool) -> multiprocessing.process.BaseProcess:
        process = CONTEXT.Process(target=run, args=(given, out, resume, out.with_suffix(".steps"), data_config))
        process.start()
        return process

    undisturbed = tmp_path / "undisturbed"
    process = started(undisturbed, False)
    process.join()
    assert process.exitcode == 0
    expected = undisturbed.with_suffix(".steps").read_text().splitlines()

    out, rng, codes = tmp_path / "run", random.Random(3), []
    steps = out.with_suffix(".steps")
    while codes.count(PREEMPTED) < SIGNALS and 0 not in codes:
        before = steps.read_text().count("\n") if steps.exists() else 0
        process = started(out, resume=out.exists())
        # Within the training: after so many more steps.
        goal = before + rng.randint(1, 6)
        while process.is_alive() and not (steps.exists() and steps.read_text().count("\n") >= goal):
            time.sleep(0.005)
        if process.is_alive():
            # With its loader's workers, as `timeout`, containers and schedulers send it.
            os.killpg(process.pid, signal.SIGTERM)
        process.join()
        codes.append(process.exitcode)
        assert codes[-1] in (0, PREEMPTED)
        assert (out / "state.ckpt").exists() == (codes[-1] == PREEMPTED)
    assert codes.count(PREEMPTED) >= 3
    if codes[-1]:
        process = started(out, resume=True)
        process.join()
        assert process.exitcode == 0
    assert steps.read_text().splitlines() == expected
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (out, undisturbed))
    assert ours["nll"] == theirs["nll"] and ours["rounds"] == theirs["rounds"]
    for name in ("last.safetensors", "best.safetensors"):
        given_weights, weights = load_file(out / name), load_file(undisturbed / name)
        assert all(torch.equal(given_weights[key], value) for key, value in weights.items()), name
