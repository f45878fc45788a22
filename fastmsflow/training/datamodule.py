"""What a run learns from and is judged on, as batches: features that are kept, or images that are read in each pass."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ..data import ShardedImages, ShardSet
from ..data.datasets import Images, Progress
from ..data.error_log import ErrorLog, SkippedImages
from ..data.reader_pool import BATCH_SIZE, ReaderPool
from ..data.shards.manifest import Shard
from ..distributed.process_group import SINGLE_PROCESS, ProcessGroup
from ..errors import InputError
from ..models.msflow import MSFlow
from ..recipe import Recipe
from .break_even import measured
from .feature_cache import FeatureCache, binary
from .features_in_memory import FeaturesInMemory, features_of_all, pooled_features
from .features_on_disk import FeaturesOnDisk, placement
from .loaders import Decode, FeatureLoader, ImageLoader, Loader, ShardLoader
from .samplers import SequentialBatchSampler, TrainBatchSampler

# Of an image set: training images, training images that are kept out of training, test images.
TRAIN, HELD_OUT, TEST = "train", "held out", "test"
# Enough for a mean and a deviation of each channel.
STANDARDISED = 2048


class TrainingData(L.LightningDataModule, ABC):
    """Batches of TRAIN and, where they are, of HELD_OUT and TEST, for one process of ``world``.

    Errors: InputError where a process would have no images of a part.
    """

    total = 0
    """How many images ``prepare`` goes through."""

    def __init__(self, model: MSFlow, recipe: Recipe, parts: Sequence[str], world: ProcessGroup) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.world = world
        self.evaluated = [part for part in parts if part != TRAIN]
        """What is scored after each meta epoch, in the order of the loaders."""

    @property
    def left_out(self) -> SkippedImages | None:
        """What could not be read, by all processes; None where that is an error."""
        return None

    @abstractmethod
    def prepare(self, progress: Progress = lambda done: None, say: Callable[[str], None] = lambda line: None) -> None:
        """What is done once, before the first pass; ``say`` is told what it costs and where things lie."""

    @abstractmethod
    def train_dataloader(self) -> Loader: ...

    @property
    @abstractmethod
    def epoch_images(self) -> int:
        """How many are learned from in an epoch, by all processes."""

    @abstractmethod
    def images_of(self, part: str) -> int:
        """How many a part has, for all processes."""

    @abstractmethod
    def in_turn(self, part: str, batch_size: int) -> Loader:
        """All images of ``part`` once, those of this process."""

    def val_dataloader(self) -> list[Loader]:
        return [self.in_turn(part, self.recipe.batch_size) for part in self.evaluated]


class OfImages(TrainingData):
    """Of image files and arrays: ``images`` by part, read by ``readers``; None: by this process. ``test_order``: in
    which those of TEST are scored; None: as they are."""

    def __init__(
        self,
        model: MSFlow,
        images: Mapping[str, Images],
        recipe: Recipe,
        readers: ReaderPool | None = None,
        world: ProcessGroup = SINGLE_PROCESS,
        test_order: Sequence[int] | None = None,
    ) -> None:
        super().__init__(model, recipe, list(images), world)
        self.readers = readers or ReaderPool()
        self.images = images
        self.test_order = test_order
        # Before any work is done.
        self._order()
        for part in self.evaluated:
            self._in_turn(part, 1)

    @property
    def epoch_images(self) -> int:
        return len(self.images[TRAIN])

    def images_of(self, part: str) -> int:
        return len(self.images[part])

    def _order(self) -> TrainBatchSampler:
        return TrainBatchSampler(len(self.images[TRAIN]), self.recipe.batch_size, self.world, self.recipe.seed)

    def _in_turn(self, part: str, batch_size: int) -> SequentialBatchSampler:
        order = self.test_order if part == TEST else None
        return SequentialBatchSampler(len(self.images[part]), batch_size, self.world, part, order)


class FeatureTrainingData(OfImages):
    """Features, computed once by ``model`` (and standardised by it, where it does that).

    ``cache``: the folder of a FeatureCache of ``cache_dtype``, used and, where it is not whole, built; None: they are
    kept in memory.
    """

    def __init__(
        self,
        model: MSFlow,
        images: Mapping[str, Images],
        recipe: Recipe,
        readers: ReaderPool | None = None,
        cache: Path | None = None,
        cache_dtype: torch.dtype = torch.bfloat16,
        world: ProcessGroup = SINGLE_PROCESS,
        test_order: Sequence[int] | None = None,
    ) -> None:
        super().__init__(model, images, recipe, readers, world, test_order)
        self.cache = cache
        self.cache_dtype = cache_dtype
        self.features: dict[str, FeaturesInMemory | FeaturesOnDisk] = {}

    @property
    def total(self) -> int:  # type: ignore[override]
        """How many images' features this process computes, or may compute."""
        if self.cache is not None:
            return sum(map(len, self.images.values()))
        return sum(len(range(self.world.rank, len(images), self.world.size)) for images in self.images.values())

    def prepare(self, progress: Progress = lambda done: None, say: Callable[[str], None] = lambda line: None) -> None:
        """Runs the extractor over all images, once; ``say`` is told what a cache costs before it is built.

        Errors: as FeatureCache's.
        """
        if self.cache is None:
            self.features.update({part: FeaturesInMemory(levels) for part, levels in self._kept(progress).items()})
        else:
            self.features.update(self._cached(self.cache, progress, say))

    def _kept(self, progress: Progress) -> dict[str, list[Tensor]]:
        before = 0
        features = {}
        with self.world.raise_on_any_rank():
            for part, images in self.images.items():
                own = range(self.world.rank, len(images), self.world.size)
                here = partial(_advance, progress, before)
                features[part] = pooled_features(self.model, images, own, self.readers, here)
                before += len(own)
        # Any process may have any of them in a batch. Of the other parts each scores its own.
        features[TRAIN] = features_of_all(features[TRAIN], len(self.images[TRAIN]), self.world)
        standardise(self.model, [features[TRAIN]], self.world)
        if self.model.standardiser is not None:
            features = {part: self.model.standardiser(levels) for part, levels in features.items()}
        return features

    def _cached(self, folder: Path, progress: Progress, say: Callable[[str], None]) -> dict[str, FeaturesOnDisk]:
        cache = FeatureCache(self.model, self.images, folder, self.cache_dtype, world=self.world)
        with self.world.raise_on_any_rank():
            missing = cache.missing()
            if missing and self.world.first:
                say(str(measured(cache)))
        with self.world.raise_on_any_rank():
            if missing:
                cache.build(self.readers, progress, self.world.rank, self.world.size)
        needed = self.total * cache.bytes_per_image
        # Each process may come to hold all of them.
        place = placement(needed, next(self.model.parameters()).device, self.world.local_size)
        say(f"features: {binary(needed)}, {place}")
        features = {part: FeaturesOnDisk(cache, rows, self.model, place) for part, rows in cache.rows.items()}
        standardise(self.model, features[TRAIN].batches(), self.world)
        return features

    def train_dataloader(self) -> Loader:
        return self._loader(TRAIN, self._order())

    def in_turn(self, part: str, batch_size: int) -> Loader:
        return self._loader(part, self._in_turn(part, batch_size))

    def _loader(self, part: str, order: TrainBatchSampler | SequentialBatchSampler) -> Loader:
        features = self.features[part]
        if isinstance(features, FeaturesOnDisk):
            return FeatureLoader(features.fetch, order, features.device.type == "cuda")
        if part == TRAIN:
            return FeatureLoader(features.fetch, order)
        # Of its own images a process has the features only.
        first, step = self.world.rank, self.world.size
        return FeatureLoader(lambda numbers: features.fetch([(n - first) // step for n in numbers]), order)


class ImageTrainingData(OfImages):
    """Images, read and put through the extractor in every pass: for sets whose features can nowhere be kept.

    ``decode``: where ``images`` are encoded, what makes pixels of a batch.
    """

    def __init__(
        self,
        model: MSFlow,
        images: Mapping[str, Images],
        recipe: Recipe,
        readers: ReaderPool | None = None,
        world: ProcessGroup = SINGLE_PROCESS,
        test_order: Sequence[int] | None = None,
        decode: Decode | None = None,
    ) -> None:
        super().__init__(model, images, recipe, readers, world, test_order)
        self.decode = decode

    def prepare(self, progress: Progress = lambda done: None, say: Callable[[str], None] = lambda line: None) -> None:
        count = min(STANDARDISED, len(self.images[TRAIN]))
        chosen = torch.randperm(
            len(self.images[TRAIN]), generator=torch.Generator().manual_seed(self.recipe.seed)
        ).tolist()[:count]
        order = SequentialBatchSampler(len(self.images[TRAIN]), BATCH_SIZE, SINGLE_PROCESS, TRAIN, chosen)
        loader = ImageLoader(self.images[TRAIN], order, self.readers, self.decode)
        standardise(self.model, _pooled(self.model, loader, count), self.world)

    def train_dataloader(self) -> Loader:
        return ImageLoader(self.images[TRAIN], self._order(), self.readers, self.decode)

    def in_turn(self, part: str, batch_size: int) -> Loader:
        return ImageLoader(self.images[part], self._in_turn(part, batch_size), self.readers, self.decode)


class ShardTrainingData(TrainingData):
    """Images out of shards, read in every pass. Errors: InputError where shards or a batch do not go round."""

    def __init__(
        self,
        model: MSFlow,
        shards: ShardSet,
        recipe: Recipe,
        workers: int = 0,
        world: ProcessGroup = SINGLE_PROCESS,
        skip_faults: Path | None = None,
        decode: Decode | None = None,
    ) -> None:
        """``skip_faults``: see ShardedImages; ``decode``: what makes pixels of a batch of encoded images; None: the
        workers do."""
        train, held_out = shards.split(recipe.hold_out, recipe.seed, world.size)
        super().__init__(model, recipe, [TRAIN, HELD_OUT] if held_out else [TRAIN], world)
        self.workers = workers
        self.set = shards
        self.skip_faults = skip_faults
        self._faults = None if skip_faults is None else ErrorLog(skip_faults)
        self.decode = decode
        self.shards: dict[str, tuple[Shard, ...]] = {TRAIN: train, HELD_OUT: held_out}
        self._own_batch, rest = divmod(recipe.batch_size, world.size)
        if rest:
            raise InputError(
                f"batches of {recipe.batch_size} images cannot be shared out among {world.size} processes that read"
                f" shards; give a multiple of {world.size}"
            )
        self._steps = self.images_of(TRAIN) // recipe.batch_size
        if not self._steps:
            raise InputError(f"{shards.where}: {self.images_of(TRAIN)} training images are less than one batch")
        # Of the smallest shards, dealt out to the process that has the fewest.
        least = sum(sorted(shard.images for shard in train)[: len(train) // world.size])
        if least < self._own_batch:
            raise InputError(
                f"{shards.where}: one of {world.size} processes may have {least} images, less than its part of a batch,"
                f" {self._own_batch}; take fewer processes or a smaller batch, or write shards of equal size, more of"
                " them"
            )

    @property
    def left_out(self) -> SkippedImages | None:
        return None if self._faults is None else self._faults.left_out()

    def state_dict(self) -> dict[str, Any]:
        """Lightning keeps it with a run's state: where the run's faults begin in their file."""
        return {"faults_from": self._faults.start} if self._faults else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._faults:
            # Less where the file is another by now.
            self._faults.start = min(self._faults.start, state_dict["faults_from"])

    @property
    def epoch_images(self) -> int:
        return self._steps * self.recipe.batch_size

    def images_of(self, part: str) -> int:
        return sum(shard.images for shard in self.shards[part])

    def prepare(self, progress: Progress = lambda done: None, say: Callable[[str], None] = lambda line: None) -> None:
        shards = self._open(TRAIN, self.recipe.seed, 0)
        count = min(STANDARDISED, sum(shards.images_of_workers))
        loader = ShardLoader(lambda epoch: shards, BATCH_SIZE, None, decode=self.decode)
        standardise(self.model, _pooled(self.model, loader, count), self.world)

    def train_dataloader(self) -> Loader:
        opened = partial(self._open, TRAIN, self.recipe.seed)
        return ShardLoader(opened, self._own_batch, self._steps, self.world, self.decode)

    def in_turn(self, part: str, batch_size: int) -> Loader:
        return ShardLoader(partial(self._open, part, None), batch_size, None, decode=self.decode)

    def _open(self, part: str, seed: int | None, epoch: int) -> ShardedImages:
        return ShardedImages(
            self.set.where,
            self.model.image_size,
            self.world.rank,
            self.world.size,
            self.workers,
            seed or 0,
            epoch,
            seed is not None,
            skip_faults=self.skip_faults,
            options=self.set.options,
            manifest=self.set.manifest,
            shards=self.shards[part],
            encoded=self.decode is not None,
        )


def standardise(model: MSFlow, batches: Iterable[Sequence[Tensor]], world: ProcessGroup) -> None:
    """Fits ``model``'s standardiser, where it has one, to pooled features, in the first process for all. One that came
    with trained weights stays: they know features by its statistics."""
    if model.standardiser is None or model.standardiser.fitted:
        return
    with world.raise_on_any_rank():
        if world.first:
            model.standardiser.fit_batches(batches)
    if world.size > 1:
        for statistics in model.standardiser.buffers():
            torch.distributed.broadcast(statistics, 0)


def _pooled(model: MSFlow, loader: Loader, images: int) -> Iterator[list[Tensor]]:
    """Of about the first ``images`` of batches of BATCH_SIZE."""
    device = next(model.parameters()).device
    for batch in islice(loader, -(-images // BATCH_SIZE)):
        assert isinstance(batch[0], Tensor)
        yield model.pooled(batch[0].to(device, memory_format=torch.channels_last))


def _advance(progress: Progress, before: int, done: int) -> None:
    progress(before + done)
