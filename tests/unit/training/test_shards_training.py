"""Training on shards that are not all as they should be."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from fastmsflow import InputError, MSFlow
from fastmsflow.data import ShardSet, write_shards
from fastmsflow.training import DataConfig, Recipe, checkpointing, train
from fastmsflow.training.lightning_module import MSFlowLightningModule
from tests.helpers.noise_images import noise_set

PER_SHARD = 4
RECIPE = Recipe(lr=1e-3, batch_size=2, meta_epochs=2, sub_epochs=1, hold_out=0)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    images = noise_set(tmp_path_factory.mktemp("images"), train=16)
    return [sample.image for sample in images.train]


@pytest.fixture
def shards(files: list[Path], tmp_path: Path) -> Path:
    """The second is cut off, the third another by one bit."""
    where = tmp_path / "set"
    write_shards(files, where, PER_SHARD)
    (where / "000001.tar").write_bytes((where / "000001.tar").read_bytes()[:2000])
    content = bytearray((where / "000002.tar").read_bytes())
    # In what fills up its last block.
    content[-1] = 1
    (where / "000002.tar").write_bytes(content)
    return where


def run(shards: Path, out: Path, data_config: DataConfig, resume: bool = False):
    torch.manual_seed(0)
    model = MSFlow("test_resnet.r160_in1k", pretrained=False, image_size=(32, 32), blocks=(1, 1, 1))
    return train(model, ShardSet.from_source(str(shards)), RECIPE, out, reading=data_config, resume=resume)


class Stopped(Exception):
    pass


def stop_in(epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    step = MSFlowLightningModule.training_step

    def stopped(self, batch, batch_index):
        if (self.current_epoch, batch_index) == (epoch, 1):
            raise Stopped
        return step(self, batch, batch_index)

    monkeypatch.setattr(MSFlowLightningModule, "training_step", stopped)
    monkeypatch.setattr(checkpointing, "SAVE_SECONDS", 0.0)


@pytest.mark.parametrize(
    ("mended", "old_state"),
    [(False, False), (True, False), (False, True)],
    ids=["", "and mended before it was resumed", "and its state was written by version 0.1"],
)
def test_what_was_left_out_is_counted_once_for_the_run_that_left_it_out(
    mended: bool, old_state: bool, files: list[Path], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = tmp_path / "faults.jsonl"
    # Of an earlier run.
    faults.write_text('{"fault": "another", "lost": 9, "epoch": 0, "rank": 0}\n')
    data_config = DataConfig(workers=1, skip_faults=faults)
    with monkeypatch.context() as patch:
        stop_in(1, patch)
        with pytest.raises(Stopped):
            run(shards, tmp_path / "run", data_config)
    if mended:
        write_shards(files, tmp_path / "good", PER_SHARD)
        for name in ("000001.tar", "000002.tar"):
            shutil.copy(tmp_path / "good" / name, shards)
    if old_state:
        state = torch.load(tmp_path / "run/state.ckpt", weights_only=True)
        state["ShardSource"] = state.pop("ShardTrainingData")
        torch.save(state, tmp_path / "run/state.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*left out")
        result = run(shards, tmp_path / "run", data_config, resume=True)
    assert len(faults.read_text().splitlines()) >= (3 if mended else 5)
    assert result.left_out == (2, PER_SHARD)
    assert json.loads((tmp_path / "run/results.json").read_text())["left_out"] == {"faults": 2, "images": PER_SHARD}


def test_shards_are_gone_on_with_by_as_many_workers_alone(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others deal out the images anew: at an epoch's end too, in another order than the one that was begun."""
    write_shards(files, tmp_path / "set", PER_SHARD)
    with monkeypatch.context() as patch:
        stop_in(1, patch)
        with pytest.raises(Stopped):
            run(tmp_path / "set", tmp_path / "run", DataConfig(workers=0))
    with pytest.raises(InputError, match=r"needs the settings that it began with: workers was 1, is 2$"):
        run(tmp_path / "set", tmp_path / "run", DataConfig(workers=2), resume=True)
    # One reads in the same order as none.
    result = run(tmp_path / "set", tmp_path / "run", DataConfig(workers=1), resume=True)
    assert (len(result.losses), result.left_out) == (2, None)
