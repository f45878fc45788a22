"""Several processes train as one does: the same losses, however the images come; and what goes wrong ends all."""

import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastmsflow import InputError, MSFlow
from fastmsflow.data import ImageDataset, ImageSet, ShardedImages, ShardSet, write_shards
from fastmsflow.distributed.process_group import ProcessGroup
from fastmsflow.tiling import Tiling
from fastmsflow.training import DataConfig, Recipe, train
from fastmsflow.training.checkpointing import ResumeCheckpoint
from fastmsflow.training.datamodule import TRAIN
from fastmsflow.training.feature_cache import FeatureCache
from fastmsflow.training.lightning_module import MSFlowLightningModule
from tests.helpers.folder_listing import names_in
from tests.helpers.noise_images import noise_set
from tests.helpers.processes import CONTEXT
from tests.helpers.tiny_model import tiny_model
from tests.helpers.tolerances import DISTRIBUTED, KEPT_TILES

pytestmark = pytest.mark.slow

RECIPE = Recipe(lr=1e-3, batch_size=5, meta_epochs=2, sub_epochs=2, hold_out=0.2)
# As within a job of other numbers of processes, which are not to be confused with ours.
SLURM = {"SLURM_NTASKS": "9", "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "1", "SLURM_PROCID": "7", "SLURM_LOCALID": "3"}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageSet:
    """20 to train on: 16 in batches of 5, the last of 1, and 4 that are held out."""
    return noise_set(tmp_path_factory.mktemp("images"), train=20)


def new_model(tiling: Tiling | None = None) -> MSFlow:
    model = tiny_model(standardise=True).double()
    model.tiling = tiling
    return model


def note_images(file: Path) -> None:
    """Writes a line for each step of training: the epoch and the numbers of the images."""
    step = MSFlowLightningModule.training_step

    def noted(self, batch, batch_index):
        with file.open("a") as lines:
            lines.write(f"{json.dumps([self.current_epoch, *map(int, batch[1])])}\n")
        return step(self, batch, batch_index)

    MSFlowLightningModule.training_step = noted


def one_of(rank: int, size: int, port: int, images: ImageSet | ShardSet, out: Path, options: dict, told) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        **SLURM,
    )
    if "seen" in options:
        note_images(options.pop("seen") / str(rank))
    world = ProcessGroup.here()
    world.join()
    recipe, model = options.pop("recipe", RECIPE), new_model(options.pop("tiling", None))
    try:
        result = train(model, images, recipe, out, world=world, **options)
        told.put((rank, result.losses, [epoch.held_out_nll for epoch in result.epoch_results]))
    except Exception as error:
        told.put((rank, type(error).__name__, str(error)))
    world.leave()


def together(size: int, images: ImageSet | ShardSet, out: Path, **options) -> list[tuple]:
    """Returns what each of ``size`` processes has to tell, by rank."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    told = CONTEXT.Queue()
    processes = [CONTEXT.Process(target=one_of, args=(r, size, port, images, out, options, told)) for r in range(size)]
    for process in processes:
        process.start()
    words = sorted(told.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    return words


def reading_of(way: str, folder: Path) -> DataConfig:
    if way == "cached":
        return DataConfig(feature_cache=folder / "cache", cache_dtype="float32")
    return DataConfig(stream=way == "streamed")


@pytest.fixture(scope="module", params=["kept", "cached", "streamed"])
def alone(request, images: ImageSet, tmp_path_factory):
    """One process: how images came, where to, and what came of it."""
    folder = tmp_path_factory.mktemp("alone")
    data_config = reading_of(request.param, folder)
    return request.param, folder / "run", train(new_model(), images, RECIPE, folder / "run", reading=data_config)


@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_have_the_losses_of_one(size: int, images: ImageSet, alone, tmp_path: Path) -> None:
    """In float64; a last batch of fewer images than processes is among them."""
    way, of_one, expected = alone
    words = together(size, images, tmp_path / "run", reading=reading_of(way, tmp_path))
    assert all(isinstance(losses, list) for _, losses, _ in words), words
    expected_held_out = [epoch.held_out_nll for epoch in expected.epoch_results]
    for _, losses, held_out in words:
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected.losses), **DISTRIBUTED)
        torch.testing.assert_close(torch.tensor(held_out), torch.tensor(expected_held_out), **DISTRIBUTED)
    ours, theirs = (load_file(out / "last.safetensors") for out in (tmp_path / "run", of_one))
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, **DISTRIBUTED)
    assert names_in(tmp_path / "run") == names_in(of_one)


@pytest.mark.parametrize("stream", [False, True])
def test_two_processes_train_on_moved_and_lit_tiles_as_one_does(stream: bool, images: ImageSet, tmp_path: Path) -> None:
    """They share out tiles to learn from, and whole images to score."""
    recipe = Recipe(lr=1e-3, batch_size=16, meta_epochs=1, sub_epochs=2, hold_out=0.2)
    data_config = DataConfig(stream=stream, augment="light", tile_jitter=3)
    tiling = Tiling(32, 0.5, position="image")
    expected = train(new_model(tiling), images, recipe, tmp_path / "one", reading=data_config)
    words = together(2, images, tmp_path / "two", recipe=recipe, reading=data_config, tiling=tiling)
    for _, losses, held_out in words:
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected.losses), **DISTRIBUTED)
        expected_held_out = torch.tensor([expected.epoch_results[0].held_out_nll])
        torch.testing.assert_close(torch.tensor(held_out), expected_held_out, **DISTRIBUTED)
    ours, theirs = (MSFlow.load(tmp_path / name / "last.safetensors").calibration for name in ("two", "one"))
    assert ours.scores == pytest.approx(theirs.scores, **KEPT_TILES)


def test_two_processes_fine_tune_parts_to_the_weights_of_one(images: ImageSet, tmp_path: Path, monkeypatch) -> None:
    """Steps of two batches, the last of them of one; a moving average; a part that is frozen, one of its own rate."""
    fine = {"freeze": ("level0",), "lr_of": {"fusion": 1e-4}, "accumulate": 2, "ema": 0.9}
    recipe = Recipe(lr=1e-3, batch_size=6, meta_epochs=2, sub_epochs=1, hold_out=0.2, **fine)
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    expected = train(new_model(), images, recipe, tmp_path / "one")
    words = together(2, images, tmp_path / "two", recipe=recipe)
    for _, losses, _ in words:
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected.losses), **DISTRIBUTED)
    ours, theirs = (load_file(tmp_path / name / "last.safetensors") for name in ("two", "one"))
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, **DISTRIBUTED)


def test_a_loss_that_is_not_finite_in_one_process_ends_all_and_is_told_once(images: ImageSet, tmp_path: Path) -> None:
    recipe = Recipe(lr=1e30, batch_size=5, meta_epochs=3, sub_epochs=2)
    words = together(2, images, tmp_path / "run", recipe=recipe)
    kinds = sorted(word[1] for word in words)
    assert kinds == ["ErrorOnAnotherRank", "NotFinite"], words
    told = next(word[2] for word in words if word[1] == "NotFinite")
    assert "of the images" in told
    assert json.loads((tmp_path / "run/not_finite.json").read_text())["images"]


def test_an_image_that_one_process_cannot_read_ends_all_and_is_told_once(images: ImageSet, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    # The second process has the second half.
    train_samples = (*images.train[:-1], replace(images.train[-1], image=broken))
    words = together(2, replace(images, train=train_samples), tmp_path / "run", recipe=Recipe(meta_epochs=1))
    assert words[0][1] == "ErrorOnAnotherRank"
    assert words[1][1:] == ("InputError", f"{broken}: not an image that can be read; remove it or save it as PNG")
    assert not (tmp_path / "run").exists()


def told_once(words: list[tuple], line: str) -> bool:
    """Tells if the first process says ``line`` and the others say nothing."""
    return (
        words[0][1] == "InputError"
        and line in words[0][2]
        and all(word[1] == "ErrorOnAnotherRank" for word in words[1:])
    )


def test_processes_without_images_are_refused_before_any_work(images: ImageSet, tmp_path: Path) -> None:
    words = together(2, images, tmp_path / "run", recipe=Recipe(batch_size=1))
    assert told_once(words, "20 training images in batches of 1, for 2 processes: some would have none"), words
    words = together(2, images, tmp_path / "run", recipe=Recipe(hold_out=0.05))
    assert told_once(words, "1 held out images for 2 processes"), words


def test_what_is_wrong_with_a_run_is_told_once(images: ImageSet, tmp_path: Path) -> None:
    words = together(2, images, tmp_path / "run", log_to=("paper",))
    assert told_once(words, "logger 'paper' is not known"), words
    FeatureCache(new_model(), {TRAIN: ImageDataset(images.train, (32, 32))}, tmp_path / "cache", dtype=torch.float32)
    words = together(2, images, tmp_path / "run", reading=DataConfig(feature_cache=tmp_path / "cache"))
    assert told_once(words, "dtype"), words


def test_a_run_that_goes_on_with_another_number_of_processes_is_refused(
    images: ImageSet, tmp_path: Path, monkeypatch
) -> None:
    def keep_and_fail(self, trainer, module):
        trainer.save_checkpoint(self._path)
        raise InputError("pulled the plug")

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(ResumeCheckpoint, "on_train_epoch_end", keep_and_fail)
        with pytest.raises(InputError, match="pulled the plug"):
            train(new_model(), images, RECIPE, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    words = together(2, images, out, resume=True)
    assert words[0][1] == "InputError" and "processes was 1, is 2" in words[0][2]
    assert words[1][1] == "ErrorOnAnotherRank"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.fixture(scope="module")
def shards(images: ImageSet, tmp_path_factory) -> ShardSet:
    """20 images in 7 shards."""
    where = tmp_path_factory.mktemp("shards")
    write_shards([sample.image for sample in images.train], where, images_per_shard=3)
    return ShardSet.from_source(str(where))


def test_processes_that_read_shards_train_together(shards: ShardSet, tmp_path: Path) -> None:
    recipe = Recipe(1e-3, 4, 2, 2, hold_out=0.2)
    words = together(2, shards, tmp_path / "run", recipe=recipe, seen=tmp_path)
    assert all(isinstance(losses, list) for _, losses, _ in words), words
    (_, losses, held_out), (_, others, others_held_out) = words
    assert (losses, held_out) == (others, others_held_out)
    assert len(losses) == 4 and losses[-1] < losses[0]
    results = json.loads((tmp_path / "run/results.json").read_text())
    # Two shards are held out, of 3 images each, or of 3 and 2.
    assert results["images"]["train"] + results["images"]["held_out"] == 20
    assert results["images"]["held_out"] in (5, 6)
    # No image is two processes', or held out. One that has fewer than it needs begins again with its first batch.
    train_shards, _ = shards.split(recipe.hold_out, recipe.seed, 2)
    there = {n for shard in train_shards for n in range(shard.first, shard.first + shard.images)}
    steps = [[json.loads(line) for line in (tmp_path / str(rank)).read_text().splitlines()] for rank in range(2)]
    for epoch in range(recipe.epochs):
        dealt = ShardedImages(
            shards.where, (32, 32), rank=0, world_size=2, seed=recipe.seed, epoch=epoch, shards=train_shards
        )
        seen = [[n for at, *numbers in of for n in numbers if at == epoch] for of in steps]
        assert not {*seen[0]} & {*seen[1]} and {*seen[0], *seen[1]} <= there
        for own, count in zip(seen, dealt.images_of_ranks, strict=True):
            whole = min(6, count // 2 * 2)
            assert len(own) == 6 and len({*own}) == whole and own[whole:] == own[: 6 - whole]


def test_shards_do_not_go_round(shards: ShardSet, tmp_path: Path) -> None:
    words = together(4, shards, tmp_path / "run", recipe=Recipe(batch_size=4, hold_out=0.2))
    line = "7 shards, too few for 4 processes to train on some and hold some out; write smaller ones"
    assert told_once(words, line), words
    words = together(2, shards, tmp_path / "run", recipe=Recipe(batch_size=3))
    assert told_once(words, "batches of 3 images cannot be shared out among 2 processes"), words


def test_a_shard_that_one_process_cannot_read_ends_all_and_is_told_once(
    shards: ShardSet, images: ImageSet, tmp_path: Path
) -> None:
    write_shards([sample.image for sample in images.train], tmp_path / "set", images_per_shard=3)
    broken = tmp_path / "set/000004.tar"
    broken.write_bytes(broken.read_bytes()[:700])
    recipe = Recipe(1e-3, 4, 1, 1)
    words = together(2, ShardSet.from_source(str(tmp_path / "set")), tmp_path / "run", recipe=recipe)
    kinds = sorted(word[1] for word in words)
    assert kinds == ["InputError", "PeerLost"], words
    assert str(broken) in next(word[2] for word in words if word[1] == "InputError")
