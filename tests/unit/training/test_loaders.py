"""Batches are shared out without loss, and a loader goes on where its state says."""

import json
import subprocess
from pathlib import Path
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmsflow import InputError, MSFlow
from fastmsflow.data import ImageFileDataset, ShardedImages, ShardSet, write_shards
from fastmsflow.data.reader_pool import ReaderPool
from fastmsflow.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from fastmsflow.training import Recipe
from fastmsflow.training.datamodule import ShardTrainingData
from fastmsflow.training.loaders import FeatureLoader, ImageLoader, Loader, ShardLoader
from fastmsflow.training.samplers import SequentialBatchSampler, TrainBatchSampler
from tests.helpers.noise_images import noise_set
from tests.helpers.paths import ROOT

SIZE = (32, 32)
COUNT = 11


@st.composite
def shared_out(draw) -> tuple[int, int, int]:
    """Images, a batch's, processes."""
    size = draw(st.integers(1, 5))
    return draw(st.integers(size, 40)), draw(st.integers(size, 12)), size


@given(shared_out(), st.integers(0, 3), st.integers(0, 5))
def test_processes_share_out_each_batch_of_one(case: tuple[int, int, int], seed: int, start: int) -> None:
    images, batch_size, size = case
    orders = [TrainBatchSampler(images, batch_size, ProcessGroup(rank, size), seed) for rank in range(size)]
    alone = TrainBatchSampler(images, batch_size, SINGLE_PROCESS, seed)
    for order in (alone, *orders):
        order.set_epoch(2)
    batches = list(alone.batches())
    assert sorted(number for part in batches for number in part.numbers) == list(range(images))
    assert all(part.weight == 1 for part in batches)
    for whole, *parts in zip(batches, *(order.batches() for order in orders), strict=True):
        own = [number for part in parts if part.weight for number in part.numbers]
        assert sorted(own) == sorted(whole.numbers)
        assert sum(part.weight for part in parts) == pytest.approx(size)
        # The mean over processes of shares times means is the batch's mean.
        mean = sum(part.weight * sum(part.numbers) / len(part.numbers) for part in parts) / size
        assert mean == pytest.approx(sum(whole.numbers) / len(whole.numbers))
    for order in (alone, *orders):
        assert list(order.batches(start)) == list(order.batches())[start:]


@given(shared_out(), st.integers(0, 3))
def test_an_epoch_takes_one_variant_of_each_image_and_one_variant_changes_nothing(
    case: tuple[int, int, int], seed: int
) -> None:
    images, batch_size, _ = case

    def numbers(variants: int | None, epoch: int) -> list[list[int]]:
        options = {} if variants is None else {"variants": variants}
        sampler = TrainBatchSampler(images, batch_size, SINGLE_PROCESS, seed, **options)
        sampler.set_epoch(epoch)
        assert list(sampler.batches(1)) == list(sampler.batches())[1:]
        return [part.numbers for part in sampler.batches()]

    assert numbers(1, 2) == numbers(None, 2)
    # As before there were variants.
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed + 2)).tolist()
    assert [number for part in numbers(1, 2) for number in part] == order
    chosen = {epoch: [number for part in numbers(64, epoch) for number in part] for epoch in (2, 3, 4)}
    assert chosen[2] == [number for part in numbers(64, 2) for number in part]
    for taken in chosen.values():
        assert sorted(number // 64 for number in taken) == list(range(images))
    # By chance they are the same in one of 64 * 64 cases for a set of one image.
    assert images < 3 or len({tuple(sorted(number % 64 for number in taken)) for taken in chosen.values()}) > 1


@given(shared_out(), st.integers(0, 5))
def test_sequentially_every_image_is_one_processs(case: tuple[int, int, int], start: int) -> None:
    images, batch_size, size = case
    order = [*range(0, images, 2), *range(1, images, 2)]
    own = []
    for rank in range(size):
        turn = SequentialBatchSampler(images, batch_size, ProcessGroup(rank, size), split="test", order=order)
        parts = list(turn.batches())
        assert list(turn.batches(start)) == parts[start:]
        assert len(turn) == len(parts) and all(len(part.numbers) <= batch_size for part in parts)
        numbers = [number for part in parts for number in part.numbers]
        assert numbers == [number for number in order if number % size == rank]
        own += numbers
    assert sorted(own) == list(range(images))


def test_tiles_of_an_image_are_one_processs_and_stay_together_in_order() -> None:
    def of_rank(rank: int) -> list[list[int]]:
        sampler = SequentialBatchSampler(
            3, 4, ProcessGroup(rank, 2), split="test", order=[2, 0, 1], items_of=lambda n: range(5 * n, 5 * n + 5)
        )
        return [part.numbers for part in sampler.batches()]

    assert of_rank(0) == [[10, 11, 12, 13], [14, 0, 1, 2], [3, 4]]
    assert of_rank(1) == [[5, 6, 7, 8], [9]]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    images = noise_set(tmp_path_factory.mktemp("images"), train=COUNT)
    return [sample.image for sample in images.train]


@pytest.fixture(scope="module")
def shards(files: list[Path], tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("shards")
    write_shards(files, where, images_per_shard=2)
    return where


def new_loader(kind: str, files: list[Path], shards: Path, **options) -> Loader:
    if kind == "features":
        return FeatureLoader(
            lambda numbers: [torch.tensor(numbers)], TrainBatchSampler(COUNT, 3, SINGLE_PROCESS, seed=1)
        )
    if kind == "images":
        return ImageLoader(
            ImageFileDataset(files, SIZE), TrainBatchSampler(COUNT, 3, SINGLE_PROCESS, seed=1), ReaderPool()
        )
    return ShardLoader(lambda epoch: ShardedImages(shards, SIZE, epoch=epoch, **options), 3, COUNT // 3)


def numbers_of(loader: Loader, epoch: int, most: int | None = None) -> list[list[int]]:
    loader.sampler.set_epoch(epoch)
    found = []
    for batch in loader:
        found.append(batch.numbers)
        if len(found) == most:
            break
    return found


@pytest.mark.parametrize("kind", ["features", "images", "shards"])
def test_a_loader_goes_on_behind_the_batches_of_its_state(kind: str, files: list[Path], shards: Path) -> None:
    whole = numbers_of(new_loader(kind, files, shards), 2)
    assert len(whole) == len(new_loader(kind, files, shards))
    for taken in range(1, len(whole)):
        before = new_loader(kind, files, shards)
        assert numbers_of(before, 2, taken) == whole[:taken]
        after = new_loader(kind, files, shards)
        after.load_state_dict(before.state_dict())
        assert numbers_of(after, 2) == whole[taken:]
        # And then from the beginning.
        assert numbers_of(after, 2) == whole


@pytest.mark.parametrize("kind", ["features", "images", "shards"])
def test_a_state_of_an_epochs_end_leaves_the_next_one_whole(kind: str, files: list[Path], shards: Path) -> None:
    before, after = new_loader(kind, files, shards), new_loader(kind, files, shards)
    numbers_of(before, 2)
    after.load_state_dict(before.state_dict())
    assert numbers_of(after, 3) == numbers_of(new_loader(kind, files, shards), 3)


def test_what_damaged_shards_lack_comes_from_the_epochs_beginning(shards: Path, files, tmp_path: Path) -> None:
    damaged = tmp_path / "set"
    write_shards(files, damaged, images_per_shard=2)
    for number in (1, 4):
        (damaged / f"{number:06}.tar").write_bytes(b"")
    loader = new_loader("shards", files, damaged, skip_faults=tmp_path / "faults.jsonl")
    batches = numbers_of(loader, 0)
    assert [len(batch) for batch in batches] == [3] * len(loader)
    assert not {2, 3, 8, 9} & {number for batch in batches for number in batch}


def test_shards_of_which_nothing_can_be_read_are_an_error_not_an_endless_loop(files, tmp_path: Path) -> None:
    damaged = tmp_path / "set"
    write_shards(files, damaged, images_per_shard=2)
    for path in damaged.glob("*.tar"):
        path.write_bytes(b"")
    loader = new_loader("shards", files, damaged, skip_faults=tmp_path / "faults.jsonl")
    with pytest.raises(InputError, match="process 0 finds less than 3 images that can be read"):
        numbers_of(loader, 0)


def test_a_state_of_a_passs_end_over_the_shards_begins_them_again(files: list[Path], shards: Path) -> None:
    """An epoch of more steps than the shards have batches, stopped where they were through."""

    def loader() -> Loader:
        return ShardLoader(lambda epoch: ShardedImages(shards, SIZE, epoch=epoch), 3, COUNT // 3 + 2)

    whole, before, after = numbers_of(loader(), 2), loader(), loader()
    assert numbers_of(before, 2, COUNT // 3) == whole[: COUNT // 3]
    after.load_state_dict(before.state_dict())
    assert numbers_of(after, 2) == whole[COUNT // 3 :]


# Shards by several workers, each of which has a last batch of its own


def read_by(workers: int, batch_size: int, steps: int | None, shards: Path, **options: object) -> ShardLoader:
    def opened(epoch: int) -> ShardedImages:
        return ShardedImages(shards, SIZE, workers=workers, epoch=epoch, buffer=3, **options)

    return ShardLoader(opened, batch_size, steps)


def with_states(loader: Loader) -> tuple[list[list[int]], list[dict]]:
    """The batches of an epoch, and the state after each."""
    loader.sampler.set_epoch(2)
    batches, states = [], []
    for batch in loader:
        batches.append(batch.numbers)
        states.append(json.loads(json.dumps(loader.state_dict())))
    return batches, states


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2, 3, 4])
@pytest.mark.parametrize(
    ("batch_size", "steps"), [(3, 3), (3, 5), (5, 2), (4, None)], ids=["", "and again", "none has a batch", "in turn"]
)
def test_workers_last_batches_are_joined_and_an_epoch_goes_on_behind_any(
    workers: int, batch_size: int, steps: int | None, shards: Path
) -> None:
    whole, states = with_states(read_by(workers, batch_size, steps, shards))
    once = [number for batch in whole[: COUNT // batch_size + (steps is None)] for number in batch]
    assert len(set(once)) == len(once) == (COUNT if steps is None else COUNT // batch_size * batch_size)
    assert [len(batch) for batch in whole[:2]] == [batch_size] * 2
    assert len(whole) == len(read_by(workers, batch_size, steps, shards)) == (steps or 3)
    for taken, state in enumerate(states, 1):
        after = read_by(workers, batch_size, steps, shards)
        after.load_state_dict(state)
        assert with_states(after)[0] == whole[taken:]


def test_joined_batches_go_on_where_a_shard_is_lost(files: list[Path], tmp_path: Path) -> None:
    write_shards(files, tmp_path / "set", images_per_shard=2)
    (tmp_path / "set/000001.tar").unlink()
    options = {"skip_faults": tmp_path / "faults.jsonl"}
    whole, states = with_states(read_by(3, 4, 3, tmp_path / "set", **options))
    assert len(whole) == 3 and not {2, 3} & {number for batch in whole for number in batch}
    for taken, state in enumerate(states, 1):
        after = read_by(3, 4, 3, tmp_path / "set", **options)
        after.load_state_dict(state)
        assert with_states(after)[0] == whole[taken:]


def test_an_epoch_of_which_no_batch_is_left_to_begin_again_with_is_an_error(files: list[Path], tmp_path: Path) -> None:
    """All but the first shards have gone since the state was kept: it would begin again for ever."""
    write_shards(files, tmp_path / "set", images_per_shard=2)
    options = {"skip_faults": tmp_path / "faults.jsonl"}
    _, states = with_states(read_by(0, 4, 5, tmp_path / "set", **options))
    for shard in sorted((tmp_path / "set").glob("*.tar"))[1:]:
        shard.unlink()
    after = read_by(0, 4, 5, tmp_path / "set", **options)
    after.load_state_dict(states[0])
    with pytest.raises(InputError, match="process 0 finds less than 4 images that can be read"):
        with_states(after)


def test_processes_one_of_which_may_lack_a_batch_are_refused_before_the_first(shards: Path) -> None:
    """Six shards, of two images and the last of one: four processes have two or one of them."""

    def source(batch_size: int, processes: int) -> ShardTrainingData:
        recipe = Recipe(batch_size=batch_size, hold_out=0)
        return ShardTrainingData(
            cast(MSFlow, None), ShardSet.from_source(str(shards)), recipe, world=ProcessGroup(0, processes)
        )

    with pytest.raises(
        InputError, match="one of 4 processes may have 1 images, less than its part of a batch, 2; take"
    ):
        source(8, 4)
    assert source(8, 2).epoch_images == 8


# Ending


ENDS = """
import sys
from fastmsflow.data import ShardedImages
from fastmsflow.training.loaders import ShardLoader

loader = ShardLoader(lambda epoch: ShardedImages(sys.argv[1], (32, 32), workers=2), 1, 9)
batches = iter(loader)
next(batches)
sys.exit(3)
"""


@pytest.mark.slow
def test_a_process_that_ends_in_mid_epoch_does_not_wait_for_its_workers(shards: Path, python: Path) -> None:
    """They survive a SIGTERM that all processes get, not the one by which theirs ends them."""
    process = subprocess.Popen([python, "-c", ENDS, shards], cwd=ROOT)
    try:
        assert process.wait(timeout=30) == 3
    finally:
        process.kill()
