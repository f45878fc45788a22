"""Features on disk: what comes out is what went in, of the same extractor, size, pool and images, or an error."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from fastmsflow import InputError, MSFlow
from fastmsflow.data import ImageDataset, ImageSet, folder
from fastmsflow.data.reader_pool import ReaderPool
from fastmsflow.nn.feature_extractor import FeatureExtractor
from fastmsflow.nn.feature_pooling import FeatureNormalizer
from fastmsflow.training import Recipe
from fastmsflow.training.cache_break_even import measure_break_even
from fastmsflow.training.datamodule import HELD_OUT, TEST, TRAIN, FeatureTrainingData
from fastmsflow.training.feature_cache import FeatureCache
from fastmsflow.training.features_in_memory import pooled_features
from fastmsflow.training.features_on_disk import FeaturesOnDisk
from tests.helpers.disks import remount, small_disk
from tests.helpers.folder_listing import names_in
from tests.helpers.noise_images import noise_set
from tests.helpers.processes import CONTEXT
from tests.helpers.tiny_model import tiny_model
from tests.helpers.tolerances import CACHED

COUNT = 10
# An image's features by the tiny extractor at 32x32, in bfloat16; three make a shard.
IMAGE_BYTES = 1792
RECIPE = Recipe(lr=1e-3, batch_size=2, meta_epochs=4, sub_epochs=3, hold_out=0.2)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageSet:
    return noise_set(tmp_path_factory.mktemp("images"), train=COUNT, test=2)


def parts_of(images: ImageSet, size: tuple[int, int] = (32, 32)) -> dict[str, ImageDataset]:
    return {TRAIN: ImageDataset(images.train, size), TEST: ImageDataset(images.test, size)}


def new_cache(images: ImageSet, at: Path, dtype: torch.dtype = torch.bfloat16, **model) -> FeatureCache:
    built = tiny_model(**model)
    return FeatureCache(built, parts_of(images, built.image_size), at, dtype=dtype, shard_bytes=3 * IMAGE_BYTES)


@pytest.fixture(scope="module")
def whole(images: ImageSet, tmp_path_factory) -> Path:
    """A finished cache in bfloat16; not to be written to."""
    at = tmp_path_factory.mktemp("whole") / "cache"
    new_cache(images, at).build()
    return at


@pytest.fixture
def extracted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that go through the extractor, the one of zeros that tells the shapes aside."""
    seen: list[int] = []
    forward = FeatureExtractor.forward

    def counted(self: FeatureExtractor, batch: torch.Tensor) -> list[torch.Tensor]:
        if batch.any():
            seen.append(len(batch))
        return forward(self, batch)

    monkeypatch.setattr(FeatureExtractor, "forward", counted)
    return seen


def content(at: Path) -> dict[str, bytes]:
    return {name: (at / name).read_bytes() for name in names_in(at)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_is_read_is_what_the_extractor_made_rounded_once(images: ImageSet, dtype, tmp_path: Path) -> None:
    cache = new_cache(images, tmp_path, dtype)
    cache.build()
    rows = [7, 0, 9, 9]
    train = ImageDataset(images.train, (32, 32))
    direct = pooled_features(cache.model, train, range(len(train)), ReaderPool())
    for level, expected in zip(cache.take(cache.rows[TRAIN][rows]), direct, strict=True):
        assert level.dtype == dtype
        assert level.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(level, expected[rows].to(dtype), **CACHED[dtype])


@pytest.mark.parametrize("place", ["in memory", "on disk"])
@pytest.mark.parametrize("standardise", [False, True])
def test_batches_are_those_of_features_kept_in_memory(
    images: ImageSet, place: str, standardise: bool, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("fastmsflow.training.datamodule.placement", lambda needed, device, processes: place)
    in_memory = FeatureTrainingData(tiny_model(standardise=standardise), parts_of(images), RECIPE)
    cached = FeatureTrainingData(
        tiny_model(standardise=standardise), parts_of(images), RECIPE, cache=tmp_path, cache_dtype=torch.float32
    )
    loaders = []
    for data in (in_memory, cached):
        data.prepare()
        loaders.append([data.train_dataloader(), *data.val_dataloader()])
        loaders[-1][0].sampler.set_epoch(3)
    for ours, theirs in zip(*loaders, strict=True):
        for (levels, numbers, *_), (expected, same, *_) in zip(ours, theirs, strict=True):
            assert numbers == same
            torch.testing.assert_close(levels, expected, **CACHED[torch.float32])
            assert all(level.is_contiguous(memory_format=torch.channels_last) for level in levels)


def test_statistics_taken_batch_by_batch_are_those_of_all_at_once() -> None:
    torch.manual_seed(0)
    # Channels whose mean is large beside their spread, where sums of squares would cancel.
    level = torch.randn(7, 5, 4, 6) * 0.01 + torch.tensor([0.0, 1.0, 10.0, 100.0, 1000.0])[:, None, None]
    at_once, streamed = FeatureNormalizer([5]), FeatureNormalizer([5])
    at_once.fit([level])
    streamed.fit_batches([batch] for batch in level.split(3))
    for fitted in (at_once, streamed):
        assert torch.equal(fitted.mean0, level.double().mean((0, 2, 3)).float())
        torch.testing.assert_close(fitted.std0, level.double().std((0, 2, 3), correction=0).float(), rtol=1e-6, atol=0)
    assert torch.equal(at_once.std0, streamed.std0)


def build_share(images: ImageSet, at: Path, rank: int) -> None:
    torch.set_num_threads(1)
    new_cache(images, at).build(rank=rank, world_size=2)


@pytest.mark.slow
def test_two_processes_build_one_cache(images: ImageSet, whole: Path, tmp_path: Path) -> None:
    processes = [CONTEXT.Process(target=build_share, args=(images, tmp_path / "cache", rank)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert content(tmp_path / "cache") == content(whole)


def test_a_process_builds_its_share_alone(images: ImageSet, tmp_path: Path, extracted: list[int]) -> None:
    cache = new_cache(images, tmp_path)
    assert cache.missing() == [0, 1, 2, 3, 4]
    cache.build(rank=1, world_size=2)
    assert cache.missing() == [0, 2, 4]
    assert extracted == [3, 3]
    with pytest.raises(InputError, match=r"000000.safetensors: missing, the feature cache is not finished"):
        cache.take([0])


def test_an_interrupted_build_goes_on_with_what_is_missing(
    images: ImageSet, whole: Path, tmp_path: Path, extracted: list[int]
) -> None:
    def pull_the_plug(done: int) -> None:
        if done > 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        new_cache(images, tmp_path).build(progress=pull_the_plug)
    killed = tmp_path / ".000002.safetensors.aside"
    killed.mkdir()
    for name in (".lock", "000002.safetensors"):
        (killed / name).write_bytes(b"of a killed process")
    assert new_cache(images, tmp_path).missing() == [2, 3, 4]
    extracted.clear()
    told: list[int] = []
    new_cache(images, tmp_path).build(progress=told.append)
    assert extracted == [3, 3, 2]
    assert told == [9, 12, 14]
    assert content(tmp_path) == content(whole)


def test_two_builds_of_one_cache_at_the_same_time_are_refused(images: ImageSet, tmp_path: Path) -> None:
    cache = new_cache(images, tmp_path)
    with (
        FileLock(tmp_path / ".lock-0-of-1"),
        pytest.raises(InputError, match="another process is building this feature cache; wait for it"),
    ):
        cache.build()


def other_weights(model: MSFlow) -> None:
    with torch.no_grad():
        next(model.extractor.parameters()).view(-1)[3] += 1e-3


@pytest.mark.parametrize(
    ("changed", "dtype", "message"),
    [
        ({"image_size": (64, 32)}, torch.bfloat16, "image size was 32x32, is 64x32"),
        ({"pool": "max"}, torch.bfloat16, "pool was avg, is max"),
        ({"layers": (0, 1, 2)}, torch.bfloat16, "layers was None, is [0, 1, 2]"),
        ({"level_strides": (1, 1, 2)}, torch.bfloat16, "level strides was None, is [1, 1, 2]"),
        ({}, torch.float32, "dtype was bfloat16, is float32"),
        ({"image_size": (64, 64), "pool": "max"}, torch.bfloat16, "32x32, is 64x64; pool was avg, is max"),
    ],
    ids=str,
)
def test_a_stale_cache_is_named_and_left_alone(
    changed: dict, dtype, message: str, images: ImageSet, whole: Path
) -> None:
    before = content(whole)
    with pytest.raises(InputError) as caught:
        new_cache(images, whole, dtype, **changed)
    assert f"{whole}: a stale feature cache: " in str(caught.value)
    assert message in str(caught.value)
    assert "remove the folder to have it built anew, or choose another folder" in str(caught.value)
    assert content(whole) == before


def test_one_changed_weight_of_the_extractor_makes_a_cache_stale(images: ImageSet, whole: Path) -> None:
    model = tiny_model()
    other_weights(model)
    with pytest.raises(InputError, match=r"a stale feature cache: extractor weights was \w{16}, is \w{16}; remove"):
        FeatureCache(model, parts_of(images), whole)


def test_where_weights_lie_in_memory_makes_nothing_stale(images: ImageSet, whole: Path) -> None:
    assert not FeatureCache(tiny_model().to(memory_format=torch.channels_last), parts_of(images), whole).missing()


def test_another_extractor_makes_a_cache_stale(images: ImageSet, whole: Path) -> None:
    model = MSFlow("resnet18", pretrained=False, image_size=(32, 32), blocks=(1, 1, 1))
    with pytest.raises(InputError, match=r"extractor was test_resnet.r160_in1k, is resnet18.tv_in1k; extractor wei"):
        FeatureCache(model, parts_of(images), whole)


def copied(images: ImageSet, to: Path) -> ImageSet:
    shutil.copytree(images.train[0].image.parents[1], to)
    return folder(to / "train", to / "test")


def test_a_changed_and_a_new_image_make_a_cache_stale(images: ImageSet, whole: Path, tmp_path: Path) -> None:
    own = copied(images, tmp_path / "images")
    victim = own.train[4].image
    pixels, times = np.array(Image.open(victim)), victim.stat()
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(victim)
    # Neither the name, nor the time, nor the number of images tells.
    os.utime(victim, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(InputError, match=r"other images: 1 of 10 are new or changed, the first is .*/train/4.png; rem"):
        new_cache(own, whole)
    Image.fromarray(pixels[::-1]).save(victim.with_name("new.png"))
    with pytest.raises(InputError, match=r"2 of 11 are new or changed, the first is .*/train/4.png"):
        new_cache(folder(tmp_path / "images/train", tmp_path / "images/test"), whole)


def test_a_cache_serves_its_images_wherever_they_are_and_however_they_are_split(
    images: ImageSet, whole: Path, tmp_path: Path, extracted: list[int]
) -> None:
    own = copied(images, tmp_path / "elsewhere")
    own.train[0].image.rename(own.train[0].image.with_name("zz.png"))
    own = folder(tmp_path / "elsewhere/train", tmp_path / "elsewhere/test")
    parts = {HELD_OUT: own.train[7:], TRAIN: own.train[:3]}
    cache = FeatureCache(tiny_model(), {part: ImageDataset(of, (32, 32)) for part, of in parts.items()}, whole)
    assert not cache.missing()
    assert extracted == []
    assert cache.rows[TRAIN].tolist() == [1, 2, 3]
    assert cache.rows[HELD_OUT].tolist() == [8, 9, 0]


def test_an_unfinished_cache_that_lost_an_image_is_not_finished_without_it(images: ImageSet, tmp_path: Path) -> None:
    new_cache(images, tmp_path).build(rank=0, world_size=2)
    fewer = ImageSet("fewer", images.train[:3] + images.train[4:], images.test)
    with pytest.raises(InputError, match="unfinished, and some of the cache's images are gone; remove the folder"):
        new_cache(fewer, tmp_path).build()


def test_what_is_damaged_is_named(images: ImageSet, whole: Path, tmp_path: Path) -> None:
    def damaged(name: str, data: bytes) -> FeatureCache:
        at = tmp_path / f"{name}{len(data)}"
        shutil.copytree(whole, at)
        (at / name).write_bytes(data)
        return new_cache(images, at)

    shard = (whole / "000001.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"000001.safetensors: damaged .*; remove it to have it built anew"):
        damaged("000001.safetensors", shard[:-10]).take([3])
    with pytest.raises(InputError, match=r"000001.safetensors: of another feature cache; remove it"):
        damaged("000001.safetensors", (whole / "000004.safetensors").read_bytes()).take([3])
    for name in ("cache.json", "images.npy"):
        for data in (b"", (whole / name).read_bytes()[:-20], b"{}"):
            with pytest.raises(InputError, match=f"{name}: damaged"):
                damaged(name, data)


def test_a_folder_of_something_else_is_not_written_into(images: ImageSet, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"mine")
    with pytest.raises(InputError, match="holds other files and no feature cache; choose another folder"):
        new_cache(images, tmp_path)
    assert content(tmp_path) == {"photo.png": b"mine"}


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_disk_that_fills_up_costs_no_whole_shard_and_the_build_goes_on(
    images: ImageSet, whole: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", "80k") as disk:
        at = disk / "cache"

        def fill(done: int) -> None:
            if done == 9:
                with pytest.raises(OSError, match="No space"), (disk / "filler").open("wb", buffering=0) as file:
                    while True:
                        file.write(b"0" * 4096)

        with pytest.raises(InputError, match=r"000002.safetensors: cannot be written, the disk is full; free some spa"):
            new_cache(images, at).build(progress=fill)
        whole_shards = ["000000.safetensors", "000001.safetensors"]
        assert names_in(at) == {*whole_shards, "cache.json", "images.npy"}
        with pytest.raises(InputError, match=r"needs \d+.\d KiB more, and the disk has 0 bytes free; free some space"):
            new_cache(images, at).build()
        (disk / "filler").unlink()
        new_cache(images, at).build()
        assert content(at) == content(whole)
        remount(disk, "ro")
        assert len(new_cache(images, at).take([0])) == 3
        with pytest.raises(InputError, match=f"{disk / 'other'}: a read-only disk; choose another folder"):
            new_cache(images, disk / "other")


def test_once_they_lie_in_memory_the_disk_is_not_read_again(images: ImageSet, whole: Path, tmp_path: Path) -> None:
    at = tmp_path / "cache"
    shutil.copytree(whole, at)
    cache = new_cache(images, at)
    features = FeaturesOnDisk(cache, cache.rows[TEST], cache.model, "in memory")
    shutil.rmtree(at)
    assert [len(level) for level in features.fetch([0, 3])] == [2, 2, 2]


def test_on_the_way_to_a_gpu_memory_is_pinned_and_nothing_waits(
    images: ImageSet, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = new_cache(images, whole)
    features = FeaturesOnDisk(cache, cache.rows[TEST], cache.model, "on disk")
    done: list[tuple] = []

    class Level:
        is_cuda = False

        def pin_memory(self) -> "Level":
            done.append(("pin",))
            return self

        def to(self, device: torch.device, non_blocking: bool) -> str:
            done.append(("to", device, non_blocking))
            return "there"

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(FeaturesOnDisk, "device", gpu)
    assert features._on_device([Level()]) == ["there"]
    assert done == [("pin",), ("to", gpu, True)]
    monkeypatch.setattr(Level, "is_cuda", True)
    level = Level()
    assert features._on_device([level]) == [level]


def test_measuring_counts_what_is_missing_and_leaves_nothing_behind(images: ImageSet, tmp_path: Path) -> None:
    cache = new_cache(images, tmp_path)
    cache.build(rank=0, world_size=2)
    before = content(tmp_path)
    even = measure_break_even(cache)
    assert (even.images, even.bytes_per_image) == (6, IMAGE_BYTES)
    assert min(even.extract, even.write, even.read) > 0
    assert content(tmp_path) == before
