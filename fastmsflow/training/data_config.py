"""The data of a training run: how images are read (DataConfig), and the plan that is made from them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..data import ImageFileDataset, ImageSet, Sample, ShardSet, fingerprint
from ..data.fingerprint import names_fingerprint
from ..data.jpeg_decoder import check_decoder, decode_batch
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
    """The images of a run, and what is known of them before the first pass."""

    source: TrainingData
    names: dict[str, Sequence[str]]
    """The names of the images of TRAIN and HELD_OUT, by number."""
    counts: dict[str, int]
    """The number of images by split, as ``results.json`` has them."""
    ground_truth: GroundTruth | None
    """Labels and masks of the test images; None if there are none."""
    description: dict[str, object]
    """Identifies these images, see ``description_of``."""
    licence: str = ""
    """One line: source and licence."""


def plan_training(
    model: MSFlow,
    images: ImageSet | ShardSet,
    recipe: Recipe,
    reading: DataConfig,
    *,
    readers: ReaderPool,
    world: ProcessGroup,
) -> TrainingPlan:
    """Chooses the splits of ``images`` and how their batches are made.

    ``readers``: the processes that read image files. Raises: InputError if the images, ``reading`` and the processes do
    not go together, and UnavailableError if JPEG files cannot be decoded on the GPU.
    """
    with world.raise_on_any_rank():
        check_reading(reading, isinstance(images, ShardSet))
        decode = _decoder(model, reading, isinstance(images, ShardSet)) if reading.decode_on_gpu else None
        if isinstance(images, ShardSet):
            source = ShardTrainingData(
                model,
                images,
                recipe,
                workers=reading.workers,
                world=world,
                skip_faults=reading.skip_faults,
                decode=decode,
            )
            return _plan_shards(source, images)
        plan = _plan_files(model, images, recipe, reading, decode=decode, readers=readers, world=world)
    # Outside the block: it takes long, so one process does it for all.
    return replace(plan, description=world.broadcast_from_rank0(lambda: description_of(images, reading)))


def _plan_shards(source: ShardTrainingData, shards: ShardSet) -> TrainingPlan:
    counts = {"train": source.images_of(TRAIN), "held_out": source.images_of(HELD_OUT), "test": 0}
    # Not the URL, which may hold a password.
    description: dict[str, object] = {"shards": shards.manifest.content}
    return TrainingPlan(source, {TRAIN: shards.names, HELD_OUT: shards.names}, counts, None, description)


def _plan_files(
    model: MSFlow,
    images: ImageSet,
    recipe: Recipe,
    reading: DataConfig,
    *,
    decode: Decode | None,
    readers: ReaderPool,
    world: ProcessGroup,
) -> TrainingPlan:
    """Returns a plan without its description."""
    if not images.train:
        raise InputError(f"{images.name}: no training images")
    ground_truth = GroundTruth.from_image_set(images, model.image_size, world) if images.test else None
    train, held_out = split(images.train, recipe)
    splits: dict[str, Sequence[Sample]] = {TRAIN: train, HELD_OUT: held_out, TEST: images.test}
    files = {
        name: ImageFileDataset([sample.image for sample in samples], model.image_size, decode is not None)
        for name, samples in splits.items()
        if samples
    }
    order = None if ground_truth is None else ground_truth.scoring_order
    if reading.stream:
        source: TrainingData = ImageTrainingData(
            model, files, recipe, readers=readers, world=world, test_order=order, decode=decode
        )
    else:
        source = FeatureTrainingData(
            model,
            files,
            recipe,
            readers=readers,
            cache=reading.feature_cache,
            cache_dtype=dtype_of(reading.cache_dtype),
            world=world,
            test_order=order,
        )
    return TrainingPlan(
        source,
        {name: _names(samples) for name, samples in splits.items()},
        {"train": len(train), "held_out": len(held_out), "test": len(images.test)},
        ground_truth,
        {},
        images.licence,
    )


def check_reading(reading: DataConfig, of_shards: bool) -> None:
    """Raises: InputError if ``reading`` contradicts itself, or does not fit the images: shards or files."""
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
    return partial(decode_batch, image_size=model.image_size, device=device)


def _names(samples: Sequence[Sample]) -> LazySequence:
    return LazySequence(len(samples), lambda number: shown(samples[number].image))


def description_of(images: ImageSet, reading: DataConfig) -> dict[str, object]:
    """Returns what identifies ``images``: a digest of their bytes or, if they are streamed, of names and sizes."""
    if not reading.stream:
        return {"name": images.name, "fingerprint": fingerprint(images)}
    return {"name": images.name, "files": names_fingerprint(images)}


def split(samples: Sequence[Sample], recipe: Recipe) -> tuple[list[Sample], list[Sample]]:
    """Returns the training samples and the held-out samples, in their order; the seed alone chooses the latter.

    Raises: InputError if nothing is left to train on.
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
