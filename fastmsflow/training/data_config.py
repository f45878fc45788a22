"""What a run learns from and is judged on, and how it is read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..data import ImageFileDataset, ImageSet, Sample, ShardSet, fingerprint
from ..data.fingerprint import names_fingerprint
from ..data.jpeg_decoder import check_decoder, decoded
from ..data.lazy_sequence import LazySequence
from ..data.reader_pool import ReaderPool
from ..distributed.process_group import ProcessGroup
from ..errors import InputError
from ..evaluation.ground_truth import GroundTruth
from ..files import shown
from ..models.msflow import MSFlow
from ..recipe import DataConfig, Recipe
from .datamodule import HELD_OUT, TEST, TRAIN, FeatureTrainingData, ImageTrainingData, ShardTrainingData, TrainingData
from .feature_cache import dtype_of
from .loaders import Decode


@dataclass(frozen=True)
class TrainingPlan:
    """What a run learns from and is judged on."""

    source: TrainingData
    names: dict[str, Sequence[str]]
    """Of the images of TRAIN and HELD_OUT, by number."""
    counts: dict[str, int]
    truth: GroundTruth | None
    description: dict[str, object]
    """What tells these images from others."""
    licence: str = ""


def planned(
    model: MSFlow,
    images: ImageSet | ShardSet,
    recipe: Recipe,
    reading: DataConfig,
    readers: ReaderPool,
    world: ProcessGroup,
) -> TrainingPlan:
    """``readers``: who reads images that are files.

    Errors: InputError where images, ``reading`` and the processes do not go together; UnavailableError as
    ``check_decoder`` has it.
    """
    with world.raise_on_any_rank():
        check_reading(reading, isinstance(images, ShardSet))
        decode = _decoder(model, reading, isinstance(images, ShardSet)) if reading.decode_on_gpu else None
        if isinstance(images, ShardSet):
            return _of_shards(model, images, recipe, reading, decode, world)
        plan = _of_files(model, images, recipe, reading, decode, readers, world)
    # Apart: one process finds it out for all, and it takes long.
    return replace(plan, description=world.broadcast_from_rank0(lambda: description_of(images, reading)))


def _of_shards(
    model: MSFlow, shards: ShardSet, recipe: Recipe, reading: DataConfig, decode: Decode | None, world: ProcessGroup
) -> TrainingPlan:
    source = ShardTrainingData(model, shards, recipe, reading.workers, world, reading.skip_faults, decode)
    counts = {"train": source.images_of(TRAIN), "held_out": source.images_of(HELD_OUT), "test": 0}
    # Without a password that a URL may hold.
    description: dict[str, object] = {"shards": shards.manifest.content}
    return TrainingPlan(source, {TRAIN: shards.names, HELD_OUT: shards.names}, counts, None, description)


def _of_files(
    model: MSFlow,
    images: ImageSet,
    recipe: Recipe,
    reading: DataConfig,
    decode: Decode | None,
    readers: ReaderPool,
    world: ProcessGroup,
) -> TrainingPlan:
    """Not described yet."""
    if not images.train:
        raise InputError(f"{images.name}: no training images")
    truth = GroundTruth.from_image_set(images, model.image_size, world) if images.test else None
    kept, held_out = split(images.train, recipe)
    parts = {TRAIN: kept, HELD_OUT: held_out, TEST: images.test}
    files = {
        part: ImageFileDataset([sample.image for sample in of], model.image_size, decode is not None)
        for part, of in parts.items()
        if of
    }
    order = None if truth is None else truth.order
    if reading.stream:
        source: TrainingData = ImageTrainingData(model, files, recipe, readers, world, order, decode)
    else:
        source = FeatureTrainingData(
            model, files, recipe, readers, reading.feature_cache, dtype_of(reading.cache_dtype), world, order
        )
    return TrainingPlan(
        source,
        {part: _names(of) for part, of in parts.items()},
        {"train": len(kept), "held_out": len(held_out), "test": len(images.test)},
        truth,
        {},
        images.licence,
    )


def check_reading(reading: DataConfig, of_shards: bool) -> None:
    """Errors: InputError where ``reading`` contradicts itself, or what is read: shards or files."""
    if reading.feature_cache is not None and of_shards:
        raise InputError("images of shards are read in every pass, their features are not kept; leave the cache out")
    if reading.feature_cache is not None and reading.stream:
        raise InputError("a feature cache is of images that are not streamed; leave one of the two out")
    if reading.skip_faults is not None and not of_shards:
        raise InputError(
            "faults are skipped of shards only; leave --error-log out, and remove files that cannot be read, or write"
            " shards, which are without them (`fastmsflow shard`)"
        )


def _decoder(model: MSFlow, reading: DataConfig, of_shards: bool) -> Decode:
    device = next(model.parameters()).device
    if device.type != "cuda" or not (reading.stream or of_shards):
        raise InputError("decoding on a GPU is for images that are streamed to one; leave it out")
    check_decoder(device)
    return partial(decoded, image_size=model.image_size, device=device)


def _names(samples: Sequence[Sample]) -> LazySequence:
    return LazySequence(len(samples), lambda number: shown(samples[number].image))


def description_of(images: ImageSet, reading: DataConfig) -> dict[str, object]:
    """What tells ``images`` from others: their bytes or, of those that are not read at first, names and sizes."""
    if not reading.stream:
        return {"name": images.name, "fingerprint": fingerprint(images)}
    return {"name": images.name, "files": names_fingerprint(images)}


def split(samples: Sequence[Sample], recipe: Recipe) -> tuple[list[Sample], list[Sample]]:
    """-> (training samples, held-out samples), in their order; which are held out depends on the seed alone.

    Errors: InputError where nothing is left to train on.
    """
    count = max(1, round(recipe.hold_out * len(samples))) if recipe.hold_out else 0
    if count >= len(samples):
        raise InputError(f"{len(samples)} training images: too few to hold any out; give more, or hold out 0")
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    chosen = set(order[:count])
    return (
        [sample for i, sample in enumerate(samples) if i not in chosen],
        [sample for i, sample in enumerate(samples) if i in chosen],
    )
