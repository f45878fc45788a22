"""Which images make up each batch, and which of them are this process's: the same wherever and whenever it is asked."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ..distributed.process_group import ProcessGroup
from ..errors import InputError


class RankBatch(NamedTuple):
    """Of a batch, what one process computes."""

    numbers: list[int]
    """Of its images."""
    share: float
    """What the mean over them counts in a mean over processes that is to be the batch's: 1 where all have as many."""


class TrainBatchSampler:
    """Batches of ``images`` numbered images, dealt out among the processes of ``world``.

    ``seed``: each epoch has an order of its own, drawn from it and the epoch's number alone.
    Errors: InputError where a process would have no images.
    """

    def __init__(self, images: int, batch_size: int, world: ProcessGroup, seed: int) -> None:
        if min(images, batch_size) < world.size:
            raise InputError(
                f"{images} training images in batches of {batch_size}, for {world.size} processes: some would have"
                " none; take fewer processes or larger batches"
            )
        self.images = images
        self.batch_size = batch_size
        self.world = world
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.images // self.batch_size)

    def parts(self, start: int = 0) -> Iterator[RankBatch]:
        """Of the batches from number ``start`` on."""
        numbers = torch.randperm(self.images, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        for i in range(start, len(self)):
            batch = numbers[i * self.batch_size : (i + 1) * self.batch_size].tolist()
            own = batch[self.world.rank :: self.world.size]
            # Of a last batch of fewer images than processes; all must take the step.
            yield RankBatch(own or batch[:1], len(own) * self.world.size / len(batch))


class SequentialBatchSampler:
    """All images once, in ``order`` or, None, their own: each process has those whose number is its rank modulo the
    processes' number.

    Errors: InputError where a process would have no images; ``what`` they are.
    """

    epoch = 0

    def __init__(
        self, images: int, batch_size: int, world: ProcessGroup, what: str, order: Sequence[int] | None = None
    ) -> None:
        if images < world.size:
            raise InputError(f"{images} {what} images for {world.size} processes: some would have none; take fewer")
        self._numbers = [n for n in (range(images) if order is None else order) if n % world.size == world.rank]
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self._numbers) // self._batch_size)

    def parts(self, start: int = 0) -> Iterator[RankBatch]:
        """Of the batches from number ``start`` on."""
        for i in range(start, len(self)):
            yield RankBatch(self._numbers[i * self._batch_size : (i + 1) * self._batch_size], 1.0)
