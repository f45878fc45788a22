"""Data modules: the training and evaluation images of a run, as batches of features or of images."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ..data import ShardedImages, ShardSet
from ..data.datasets import ImageFileDataset, Progress, count_from
from ..data.error_log import ErrorLog, SkippedImages
from ..data.image_tiles import ImageTiles
from ..data.reader_pool import BATCH_SIZE, ReaderPool, batched
from ..data.shards.manifest import Shard
from ..distributed.process_group import SINGLE_PROCESS, ProcessGroup
from ..errors import InputError
from ..files import shown
from ..models.msflow import MSFlow
from ..recipe import Recipe
from .cache_break_even import measure_break_even
from .feature_cache import FeatureCache, binary
from .features_in_memory import FeaturesInMemory, block_of, gather_features, pooled_features, standardize_in_place
from .features_on_disk import FeaturesOnDisk, placement
from .loaders import Decode, FeatureLoader, ImageLoader, Loader, ShardLoader
from .memory_check import check_memory
from .samplers import BatchSampler, SequentialBatchSampler, TrainBatchSampler

# An image set's splits: training images, training images that are held out of training, test images.
TRAIN, HELD_OUT, TEST = "train", "held out", "test"
# Enough for a mean and a deviation of each channel.
STANDARDIZER_IMAGES = 2048


def _ignore(value: object) -> None:
    pass


class TrainingData(L.LightningDataModule, ABC):
    """Batches of TRAIN and, where they are, of HELD_OUT and TEST, for one process of ``world``.

    Raises: InputError if a process would have no images of a split.
    """

    def __init__(self, model: MSFlow, recipe: Recipe, splits: Sequence[str], world: ProcessGroup) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.world = world
        self.evaluated = [split for split in splits if split != TRAIN]
        """The splits that are scored after each meta epoch, in the order of the loaders."""

    @property
    def total(self) -> int:
        """The number of images that ``prepare`` goes through."""
        return 0

    @property
    def left_out(self) -> SkippedImages | None:
        """The images that could not be read, by all processes; None if such an image is an error."""
        return None

    @abstractmethod
    def prepare(self, progress: Progress = _ignore, say: Callable[[str], None] = _ignore) -> None:
        """Does what is done once, before the first pass. ``say`` gets lines about its cost and where features lie."""

    @abstractmethod
    def train_dataloader(self) -> Loader:
        """Returns the loader of TRAIN."""

    @property
    @abstractmethod
    def epoch_images(self) -> int:
        """The number of images that an epoch trains on, in all processes."""

    @abstractmethod
    def images_of(self, split: str) -> int:
        """Returns the number of images in a split, for all processes."""

    def tiles_of(self, split: str) -> ImageTiles | None:
        """Returns the tiles of the images in a split; None if images are whole."""
        return None

    @abstractmethod
    def sequential_loader(self, split: str, batch_size: int) -> Loader:
        """Returns a loader of this process's images of ``split``, each once."""

    def val_dataloader(self) -> list[Loader]:
        """Returns the loaders of the splits that are evaluated."""
        return [self.sequential_loader(split, self.recipe.batch_size) for split in self.evaluated]


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Options of reading image files for a training."""

    readers: ReaderPool = field(default_factory=ReaderPool)
    """The processes that read; by default this one."""
    world: ProcessGroup = SINGLE_PROCESS
    """The processes that share the training."""
    test_order: Sequence[int] | None = None
    """The order in which images of TEST are scored; None: ascending numbers."""
    decode: Decode | None = None
    """Makes pixels of a batch of encoded images; None if images are not encoded."""


class FileTrainingData(TrainingData):
    """Batches of image files and arrays, or of views of these. ``images``: the images of each split."""

    def __init__(
        self,
        model: MSFlow,
        images: Mapping[str, ImageFileDataset],
        recipe: Recipe,
        options: ReadOptions | None = None,
    ) -> None:
        self.options = options or ReadOptions()
        super().__init__(model, recipe, list(images), self.options.world)
        self.images = images
        # Samplers raise if images and processes do not fit: before any work is done.
        self._train_sampler()
        for split in self.evaluated:
            self._sequential_sampler(split, 1)

    @property
    def epoch_images(self) -> int:
        return len(self.images[TRAIN]) // self.images[TRAIN].variants

    def images_of(self, split: str) -> int:
        return self.images[split].image_count

    def tiles_of(self, split: str) -> ImageTiles | None:
        return self.images[split].tiles

    def train_dataloader(self) -> Loader:
        return self._loader(TRAIN, self._train_sampler())

    def sequential_loader(self, split: str, batch_size: int) -> Loader:
        return self._loader(split, self._sequential_sampler(split, batch_size))

    @abstractmethod
    def _loader(self, split: str, sampler: BatchSampler) -> Loader:
        """Returns a loader of the batches of ``split`` that ``sampler`` chooses."""

    def _train_sampler(self) -> TrainBatchSampler:
        recipe, variants = self.recipe, self.images[TRAIN].variants
        return TrainBatchSampler(self.epoch_images, recipe.batch_size, self.world, recipe.seed, variants=variants)

    def _sequential_sampler(self, split: str, batch_size: int) -> SequentialBatchSampler:
        images, order = self.images[split], self.options.test_order if split == TEST else None
        return SequentialBatchSampler(
            images.image_count, batch_size, self.world, split=split, order=order, items_of=images.items_of
        )


class FeatureTrainingData(FileTrainingData):
    """Batches of features, which ``model`` computes once (and standardizes, if it does that).

    ``cache``: the folder of a FeatureCache of ``cache_dtype``, which is used and, if it is not complete, built; None:
    features are held in memory. Raises: InputError if they are larger than that.
    """

    def __init__(
        self,
        model: MSFlow,
        images: Mapping[str, ImageFileDataset],
        recipe: Recipe,
        options: ReadOptions | None = None,
        *,
        cache: Path | None = None,
        cache_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(model, images, recipe, options)
        self.cache = cache
        self.cache_dtype = cache_dtype
        self.features: dict[str, FeaturesInMemory | FeaturesOnDisk] = {}
        if cache is None:
            check_memory(model, images, self.world, shared=TRAIN)

    @property
    def total(self) -> int:
        """The number of images whose features this process computes, or may compute."""
        if self.cache is not None:
            return sum(map(len, self.images.values()))
        return sum(len(self._own_numbers(split)) for split in self.images)

    def prepare(self, progress: Progress = _ignore, say: Callable[[str], None] = _ignore) -> None:
        """Runs the extractor over all images, once.

        Raises: InputError if the cache is stale, damaged or cannot be written (see FeatureCache).
        """
        if self.cache is None:
            self._compute_features(progress)
        else:
            self._open_cache(self.cache, progress, say)

    def _own_numbers(self, split: str) -> Sequence[int]:
        """Returns the numbers of the images, or tiles, whose features this process computes.

        It may have any training image in a batch; of the other splits it scores its own images only.
        """
        images = self.images[split]
        if split == TRAIN:
            return block_of(self.world.rank, len(images), self.world)
        own = range(self.world.rank, images.image_count, self.world.size)
        return [number for image in own for number in images.items_of(image)]

    def _compute_features(self, progress: Progress) -> None:
        features: dict[str, list[Tensor]] = {}
        before = 0
        with self.world.raise_on_any_rank():
            for split, images in self.images.items():
                own = self._own_numbers(split)
                counted = count_from(before, progress)
                features[split] = pooled_features(self.model, images, own, self.options.readers, progress=counted)
                before += len(own)
        features[TRAIN] = gather_features(features[TRAIN], len(self.images[TRAIN]), self.world)
        fit_standardizer(self.model, [features[TRAIN]], self.world)
        for split, levels in features.items():
            if self.model.standardiser is not None:
                standardize_in_place(levels, self.model.standardiser)
            self.features[split] = FeaturesInMemory(levels, None if split == TRAIN else self._own_numbers(split))

    def _open_cache(self, folder: Path, progress: Progress, say: Callable[[str], None]) -> None:
        cache = FeatureCache(self.model, self.images, folder, dtype=self.cache_dtype, world=self.world)
        with self.world.raise_on_any_rank():
            if cache.missing() and self.world.first:
                say(str(measure_break_even(cache)))
        with self.world.raise_on_any_rank():
            cache.build(self.options.readers, progress, rank=self.world.rank, world_size=self.world.size)
        with self.world.raise_on_any_rank():
            unchecked = cache.check(self.world.rank, self.world.size)
            if unchecked:
                say(f"{shown(folder)}: {unchecked} shards of an earlier version have no checksum and are not checked")
        needed = self.total * cache.bytes_per_image
        # Each process may come to hold all of them.
        place = placement(needed, next(self.model.parameters()).device, self.world.local_size)
        say(f"features: {binary(needed)}, {place}")
        features = {split: FeaturesOnDisk(cache, rows, self.model, place) for split, rows in cache.rows.items()}
        train = features[TRAIN]
        fit_standardizer(self.model, map(train.stored, batched(range(len(train)))), self.world)
        self.features.update(features)

    def _loader(self, split: str, sampler: BatchSampler) -> Loader:
        features = self.features[split]
        prefetch = isinstance(features, FeaturesOnDisk) and features.device.type == "cuda"
        return FeatureLoader(features.fetch, sampler, prefetch, offsets=self.images[split].offsets)


class ImageTrainingData(FileTrainingData):
    """Batches of images that are read and go through the extractor in every pass: for features that fit nowhere."""

    def prepare(self, progress: Progress = _ignore, say: Callable[[str], None] = _ignore) -> None:
        count = min(STANDARDIZER_IMAGES, len(self.images[TRAIN]))
        generator = torch.Generator().manual_seed(self.recipe.seed)
        order = torch.randperm(len(self.images[TRAIN]), generator=generator)[:count]
        # An image is read once for all of its tiles that follow each other.
        order = order.sort().values if self.images[TRAIN].tiles else order
        sampler = SequentialBatchSampler(count, BATCH_SIZE, SINGLE_PROCESS, split=TRAIN, order=order.tolist())
        fit_standardizer(self.model, _first_features(self.model, self._loader(TRAIN, sampler), count), self.world)

    def _loader(self, split: str, sampler: BatchSampler) -> Loader:
        return ImageLoader(self.images[split], sampler, self.options.readers, self.options.decode)


class ShardTrainingData(TrainingData):
    """Batches of images out of shards, which are read in every pass.

    ``workers``: processes that read. ``skip_faults``: see ShardedImages. ``decode``: makes pixels of a batch of encoded
    images; None: the workers do. ``augment``: training images are shown in changed light, drawn anew in each epoch.
    Raises: InputError if the shards or a batch cannot be shared out among the processes.
    """

    def __init__(
        self,
        model: MSFlow,
        shards: ShardSet,
        recipe: Recipe,
        *,
        workers: int = 0,
        world: ProcessGroup = SINGLE_PROCESS,
        skip_faults: Path | None = None,
        decode: Decode | None = None,
        augment: bool = False,
    ) -> None:
        train, held_out = shards.split(recipe.hold_out, recipe.seed, world.size)
        super().__init__(model, recipe, [TRAIN, HELD_OUT] if held_out else [TRAIN], world)
        self.set = shards
        self.shards: dict[str, tuple[Shard, ...]] = {TRAIN: train, HELD_OUT: held_out}
        self.workers = workers
        self.skip_faults = skip_faults
        self.decode = decode
        self._light_seed = recipe.seed if augment else None
        self._error_log = None if skip_faults is None else ErrorLog(skip_faults)
        self._own_batch, rest = divmod(recipe.batch_size, world.size)
        if rest:
            raise InputError(
                f"batches of {recipe.batch_size} images cannot be shared out among {world.size} processes that read"
                f" shards; give a multiple of {world.size}"
            )
        self._steps = self.images_of(TRAIN) // recipe.batch_size
        if not self._steps:
            raise InputError(f"{shards.where}: {self.images_of(TRAIN)} training images are less than one batch")
        # The process with the fewest shards may get the smallest ones.
        least = sum(sorted(shard.images for shard in train)[: len(train) // world.size])
        if least < self._own_batch:
            raise InputError(
                f"{shards.where}: one of {world.size} processes may have {least} images, less than its part of a batch,"
                f" {self._own_batch}; take fewer processes or a smaller batch, or write shards of equal size, more of"
                " them"
            )

    @property
    def left_out(self) -> SkippedImages | None:
        return None if self._error_log is None else self._error_log.skipped_images()

    def state_dict(self) -> dict[str, Any]:
        """Returns where the run's faults begin in their file; Lightning saves it with a run's state."""
        return {"faults_from": self._error_log.start} if self._error_log else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Sets where the run's faults begin in their file."""
        if self._error_log:
            # The file may have been replaced by a shorter one.
            self._error_log.start = min(self._error_log.start, state_dict["faults_from"])

    @property
    def epoch_images(self) -> int:
        return self._steps * self.recipe.batch_size

    def images_of(self, split: str) -> int:
        return sum(shard.images for shard in self.shards[split])

    def prepare(self, progress: Progress = _ignore, say: Callable[[str], None] = _ignore) -> None:
        shards = self._open(TRAIN, self.recipe.seed, 0)
        count = min(STANDARDIZER_IMAGES, sum(shards.images_of_workers))
        loader = ShardLoader(lambda epoch: shards, BATCH_SIZE, None, decode=self.decode, light_seed=self._light_seed)
        fit_standardizer(self.model, _first_features(self.model, loader, count), self.world)

    def train_dataloader(self) -> Loader:
        open_shards = partial(self._open, TRAIN, self.recipe.seed)
        return ShardLoader(
            open_shards, self._own_batch, self._steps, world=self.world, decode=self.decode, light_seed=self._light_seed
        )

    def sequential_loader(self, split: str, batch_size: int) -> Loader:
        return ShardLoader(partial(self._open, split, None), batch_size, None, decode=self.decode)

    def _open(self, split: str, seed: int | None, epoch: int) -> ShardedImages:
        return ShardedImages(
            self.set.where,
            self.model.image_size,
            rank=self.world.rank,
            world_size=self.world.size,
            workers=self.workers,
            seed=seed or 0,
            epoch=epoch,
            shuffle=seed is not None,
            skip_faults=self.skip_faults,
            options=self.set.options,
            manifest=self.set.manifest,
            shards=self.shards[split],
            encoded=self.decode is not None,
        )


def fit_standardizer(model: MSFlow, batches: Iterable[Sequence[Tensor]], world: ProcessGroup) -> None:
    """Fits ``model``'s standardizer, if it has one, to pooled features, in the first process for all. A standardizer
    that came with trained weights stays, as these weights know features by its statistics."""
    if model.standardiser is None or model.standardiser.fitted:
        return
    with world.raise_on_any_rank():
        if world.first:
            model.standardiser.fit_batches(batches)
    if world.size > 1:
        for statistics in model.standardiser.buffers():
            torch.distributed.broadcast(statistics, 0)


def _first_features(model: MSFlow, loader: Loader, images: int) -> Iterator[list[Tensor]]:
    """Yields pooled features of about the first ``images`` images, in batches of BATCH_SIZE."""
    device = next(model.parameters()).device
    for batch in islice(loader, -(-images // BATCH_SIZE)):
        assert isinstance(batch.inputs, Tensor)
        yield model.pooled(batch.inputs.to(device, memory_format=torch.channels_last), fused=True)
