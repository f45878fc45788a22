"""Plans a training run: the splits of its images, and how their batches are made."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from ..data import ImageFileDataset, ImageSet, Sample, ShardSet, fingerprint
from ..data.fingerprint import names_fingerprint
from ..data.image_tiles import ImageTiles
from ..data.jpeg_decoder import check_decoder, decode_batch
from ..data.lazy_sequence import LazySequence
from ..data.light import check_augment
from ..data.reader_pool import ReaderPool
from ..data.view_dataset import UNCHANGED, Variation, ViewDataset
from ..distributed.process_group import ProcessGroup
from ..errors import InputError
from ..evaluation.ground_truth import GroundTruth
from ..files import shown
from ..models.msflow import MSFlow
from ..recipe import DataConfig, Recipe
from .datamodule import (
    HELD_OUT,
    TEST,
    TRAIN,
    FeatureTrainingData,
    ImageTrainingData,
    ReadOptions,
    ShardTrainingData,
    TrainingData,
)
from .feature_cache import dtype_of
from .held_out import check_hold_out, split
from .loaders import Decode


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """The images of a run, and what is known of them before the first pass."""

    source: TrainingData
    names: dict[str, Sequence[str]]
    """The names of the images or tiles of TRAIN, and of the images of HELD_OUT, by number."""
    counts: dict[str, int]
    """The number of images by split, as ``results.json`` has them; ``validation``: of those held out, the set's own."""
    ground_truth: GroundTruth | None
    """Labels and masks of the test images; None if there are none."""
    description: dict[str, object]
    """Identifies these images, see ``describe_images``."""
    name: str | None = None
    """The image set's name: the class, where there are several; None: shards have none."""
    licence: str = ""
    """One line: source and licence."""

    @property
    def held_out_images(self) -> str:
        """The images that choose the best epoch, in words."""
        own = self.counts.get("validation")
        return f"{own} validation images" if own else f"{self.counts['held_out']} good images held out of training"


def plan_training(
    model: MSFlow,
    images: ImageSet | ShardSet,
    recipe: Recipe,
    data_config: DataConfig,
    *,
    readers: ReaderPool,
    world: ProcessGroup,
) -> TrainingPlan:
    """Chooses the splits of ``images`` and how their batches are made.

    ``readers``: the processes that read image files. Raises: InputError if the images, ``data_config`` and the
    processes do not go together, and UnavailableError if JPEG files cannot be decoded on the GPU.
    """
    with world.raise_on_any_rank():
        check_hold_out(images, recipe)
        check_data_config(data_config, isinstance(images, ShardSet))
        check_tiling(model, data_config, isinstance(images, ShardSet))
        decode = _make_decoder(model, data_config, isinstance(images, ShardSet)) if data_config.decode_on_gpu else None
        if isinstance(images, ShardSet):
            return _plan_shards(model, images, recipe, data_config, decode=decode, world=world)
        options = ReadOptions(readers=readers, world=world, decode=decode)
        plan = _plan_files(model, images, recipe, data_config, options=options)
    # Outside the block: it takes long, so one process does it for all.
    return replace(plan, description=world.broadcast_from_rank0(lambda: describe_images(images, data_config)))


def _plan_shards(
    model: MSFlow,
    shards: ShardSet,
    recipe: Recipe,
    data_config: DataConfig,
    *,
    decode: Decode | None,
    world: ProcessGroup,
) -> TrainingPlan:
    source = ShardTrainingData(
        model,
        shards,
        recipe,
        workers=data_config.workers,
        world=world,
        skip_faults=data_config.skip_faults,
        decode=decode,
        augment=data_config.augment is not None,
    )
    return TrainingPlan(
        source=source,
        names={TRAIN: shards.names, HELD_OUT: shards.names},
        counts={"train": source.images_of(TRAIN), "held_out": source.images_of(HELD_OUT), "test": 0},
        ground_truth=None,
        # Not the URL, which may hold a password.
        description={"shards": shards.manifest.content},
    )


def _plan_files(
    model: MSFlow, images: ImageSet, recipe: Recipe, data_config: DataConfig, *, options: ReadOptions
) -> TrainingPlan:
    """Returns a plan without its description."""
    if not images.train:
        raise InputError(f"{images.name}: no training images")
    ground_truth = None
    if images.test:
        size = model.image_size if model.tiling is None else None
        ground_truth = GroundTruth.from_image_set(images, size, options.world)
        options = replace(options, test_order=ground_truth.scoring_order)
    train, held_out = split(images, recipe)
    splits: dict[str, Sequence[Sample]] = {TRAIN: train, HELD_OUT: held_out, TEST: images.test}
    files = {
        name: _dataset(model, samples, _variation(recipe, data_config) if name == TRAIN else None, options)
        for name, samples in splits.items()
        if samples
    }
    if data_config.stream:
        source: TrainingData = ImageTrainingData(model, files, recipe, options)
    else:
        dtype = dtype_of(data_config.cache_dtype)
        cache = data_config.feature_cache
        source = FeatureTrainingData(model, files, recipe, options, cache=cache, cache_dtype=dtype)
    own = {"validation": len(images.validation)} if images.validation else {}
    return TrainingPlan(
        source=source,
        names={TRAIN: _item_names(files[TRAIN]), HELD_OUT: _names(held_out)},
        counts={"train": len(train), "held_out": len(held_out), "test": len(images.test)} | own,
        ground_truth=ground_truth,
        description={},
        name=images.name,
        licence=images.licence,
    )


def _variation(recipe: Recipe, data_config: DataConfig) -> Variation | None:
    if not data_config.varies:
        return None
    return Variation(
        seed=recipe.seed,
        light=data_config.augment is not None,
        jitter=data_config.tile_jitter,
        variants=data_config.variants,
        epoch=0 if data_config.stream else None,
    )


def _dataset(
    model: MSFlow, samples: Sequence[Sample], variation: Variation | None, options: ReadOptions
) -> ImageFileDataset:
    images = [sample.image for sample in samples]
    if model.tiling is None and variation is None:
        return ImageFileDataset(images, model.image_size, options.decode is not None)
    tiles = None if model.tiling is None else ImageTiles(images, model.tiling)
    return ViewDataset(images, model.image_size, tiles, variation or UNCHANGED)


def check_data_config(data_config: DataConfig, of_shards: bool) -> None:
    """Raises: InputError if ``data_config`` contradicts itself, or does not fit the images: shards or files."""
    check_augment(data_config.augment)
    if data_config.augment_variants is not None and of_shards:
        raise InputError("augment_variants: views of shards, which are streamed, are drawn anew; leave it out")
    if data_config.decode_on_gpu and data_config.augment is not None:
        raise InputError("light is changed by the processes that read images; leave decode_on_gpu or augment out")
    if data_config.feature_cache is not None and of_shards:
        raise InputError("images of shards are read in every pass, their features are not kept; leave the cache out")
    if data_config.feature_cache is not None and data_config.stream:
        raise InputError("a feature cache is of images that are not streamed; leave one of the two out")
    if data_config.skip_faults is not None and not of_shards:
        raise InputError(
            "faults are skipped of shards only; leave --error-log out, and remove files that cannot be read, or write"
            " shards, which are without them (`fastmsflow shard`)"
        )


def check_tiling(model: MSFlow, data_config: DataConfig, of_shards: bool) -> None:
    """Raises: InputError if ``data_config`` or the images, shards or files, do not fit the model's tiling."""
    if model.tiling is None:
        if data_config.tile_jitter:
            raise InputError("tile_jitter moves tiles, and this model takes whole images; leave it out")
    elif of_shards:
        raise InputError("images of shards are not cut into tiles; train from the files that they were made of")
    elif data_config.decode_on_gpu:
        raise InputError("images that are decoded on the GPU are not cut into tiles; leave decode_on_gpu out")


def _make_decoder(model: MSFlow, data_config: DataConfig, of_shards: bool) -> Decode:
    device = next(model.parameters()).device
    if device.type != "cuda" or not (data_config.stream or of_shards):
        raise InputError("decoding on a GPU is for images that are streamed to one; leave it out")
    check_decoder(device)
    return partial(decode_batch, image_size=model.image_size, device=device)


def _names(samples: Sequence[Sample]) -> LazySequence[str]:
    return LazySequence(len(samples), lambda number: shown(samples[number].image))


def _item_names(images: ImageFileDataset) -> LazySequence[str]:
    return LazySequence(len(images), lambda number: shown(images.view_name(number)))


def describe_images(images: ImageSet, data_config: DataConfig) -> dict[str, object]:
    """Returns what identifies ``images``: a digest of their bytes or, if they are streamed, of names and sizes."""
    if not data_config.stream:
        return {"name": images.name, "fingerprint": fingerprint(images)}
    return {"name": images.name, "files": names_fingerprint(images)}
