"""Samplers that choose the images of each batch, and share them out among processes.

A sampler's batches depend on its arguments and the epoch alone, so every process, and a resumed run, finds the same.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from ..distributed.process_group import ProcessGroup
from ..errors import InputError


class RankBatch(NamedTuple):
    """The images of a batch that one process computes."""

    numbers: list[int]
    """The numbers of the images, of their tiles, or of variants of these."""
    weight: float
    """The weight of the mean over these images in a mean over processes that is to be the batch's mean: 1 if every
    process has as many images."""


class EpochCounter:
    """Holds the number of the epoch of the next pass, which Lightning sets."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the next pass."""
        self.epoch = epoch


class TrainBatchSampler(EpochCounter):
    """Yields batches of ``images`` numbered images in random order, each shared out among the processes of ``world``.

    Each epoch has an order of its own, drawn from ``seed`` and the epoch's number. ``variants``: the number of variants
    of each image, of which an epoch takes one; those of image n have the numbers from n * variants on. Raises:
    InputError if a process would have no images.
    """

    def __init__(self, images: int, batch_size: int, world: ProcessGroup, seed: int, *, variants: int = 1) -> None:
        if min(images, batch_size) < world.size:
            raise InputError(
                f"{images} training images in batches of {batch_size}, for {world.size} processes: some would have"
                " none; take fewer processes or larger batches"
            )
        self._images = images
        self._batch_size = batch_size
        self._world = world
        self._seed = seed
        self._variants = variants

    def __len__(self) -> int:
        return -(-self._images // self._batch_size)

    def batches(self, start: int = 0) -> Iterator[RankBatch]:
        """Yields the batches of the epoch from number ``start`` on."""
        generator = torch.Generator().manual_seed(self._seed + self.epoch)
        numbers = torch.randperm(self._images, generator=generator)
        if self._variants > 1:
            chosen = torch.randint(self._variants, (self._images,), generator=generator)
            numbers = numbers * self._variants + chosen
        for i in range(start, len(self)):
            batch = numbers[i * self._batch_size : (i + 1) * self._batch_size].tolist()
            own = batch[self._world.rank :: self._world.size]
            # A last batch may have fewer images than there are processes; all must take the step.
            yield RankBatch(own or batch[:1], len(own) * self._world.size / len(batch))


class SequentialBatchSampler(EpochCounter):
    """Yields every image once, in a fixed order: each process has the images whose number modulo the number of
    processes is its rank.

    ``split``: names the images in errors. ``order``: their numbers; None: ascending. ``items_of``: returns the numbers
    of an image's tiles, which are yielded in its place and in order; by default an image is one item.
    Raises: InputError if a process would have no images.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        world: ProcessGroup,
        *,
        split: str,
        order: Sequence[int] | None = None,
        items_of: Callable[[int], Sequence[int]] = lambda image: (image,),
    ) -> None:
        if images < world.size:
            raise InputError(f"{images} {split} images for {world.size} processes: some would have none; take fewer")
        own = (n for n in (range(images) if order is None else order) if n % world.size == world.rank)
        self._numbers = [item for image in own for item in items_of(image)]
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self._numbers) // self._batch_size)

    def batches(self, start: int = 0) -> Iterator[RankBatch]:
        """Yields the batches of the epoch from number ``start`` on."""
        for i in range(start, len(self)):
            yield RankBatch(self._numbers[i * self._batch_size : (i + 1) * self._batch_size], 1.0)


BatchSampler = TrainBatchSampler | SequentialBatchSampler
