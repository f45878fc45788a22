"""Chooses the good images that no step learns from: they choose the best epoch and set thresholds."""

from collections.abc import Sequence

import torch

from ..data import ImageSet, Sample, ShardSet
from ..errors import InputError
from ..recipe import Recipe


def validation_of(images: ImageSet | ShardSet) -> Sequence[Sample]:
    """Returns the validation images that a set has of its own; a set of shards has none."""
    return images.validation if isinstance(images, ImageSet) else ()


def check_hold_out(images: ImageSet | ShardSet, recipe: Recipe) -> None:
    """Raises: InputError if ``recipe`` holds images out of a set that has validation images of its own, or stops early
    by images that are not there."""
    own = len(validation_of(images))
    if own and recipe.hold_out:
        raise InputError(
            f"{images.name}: has {own} validation images of its own, so none of its training images is held out; leave"
            " hold_out out, or give 0"
        )
    if recipe.patience is not None and not own and not recipe.hold_out:
        raise InputError("patience counts rounds by images that were held out: give hold_out, e.g. 0.1")


def split(images: ImageSet, recipe: Recipe) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """Returns the samples to train on and those held out, in their order.

    The latter are the set's own validation images or, where it has none, a share of ``images.train``, which the seed
    alone chooses. Raises: InputError if nothing is left to train on.
    """
    if images.validation:
        return images.train, images.validation
    samples = images.train
    count = max(1, round(recipe.hold_out * len(samples))) if recipe.hold_out else 0
    if count >= len(samples):
        raise InputError(f"{len(samples)} training images: too few to hold any out; give more, or hold out 0")
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    chosen = set(order[:count])
    return (
        [sample for i, sample in enumerate(samples) if i not in chosen],
        [sample for i, sample in enumerate(samples) if i in chosen],
    )
