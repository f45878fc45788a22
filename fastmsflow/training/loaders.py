"""Loaders of batches for a trainer. Each one knows its position in its epoch, and resumes there."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate

from ..data import ShardedImages
from ..data.ahead_loader import AheadLoader
from ..data.datasets import ImageFileDataset
from ..data.light import draw_light
from ..data.reader_pool import ReaderPool, batched, collate_encoded
from ..distributed.process_group import SINGLE_PROCESS, ProcessGroup
from ..errors import InputError
from .samplers import BatchSampler, EpochCounter

Decode = Callable[[list[Tensor], list[str]], tuple[Tensor, dict[int, InputError]]]
"""Makes pixels of encoded images and their names, as ``jpeg_decoder.decode_batch`` does."""


class Batch(NamedTuple):
    """A batch for one process."""

    inputs: list[Tensor] | Tensor
    """Features per level, (B, C_l, H_l, W_l), or images, (B, 3, H, W)."""
    numbers: list[int]
    """The numbers of the images, of their tiles, or of variants of these."""
    weight: float
    """See ``RankBatch.weight``."""
    offsets: Tensor | None = None
    """(B, 2) float64: the places of tiles, if the flow is to know them, see Tiling.offsets."""


class Loader(ABC):
    """Yields the batches of one epoch after the other. Lightning saves ``state_dict`` with a run's state."""

    # Lightning looks for this too.
    batch_sampler = None

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        """A BatchSampler, or an EpochCounter; Lightning calls ``set_epoch`` of it."""
        self.waited = 0.0
        """Seconds that the callers have waited for batches."""
        self._taken = 0
        self._loaded: dict[str, Any] = {}

    def __iter__(self) -> Iterator[Batch]:
        # The state of another epoch's end says nothing about this one.
        state = self._loaded if self._loaded.get("epoch") == self.sampler.epoch else {}
        self._loaded = {}
        self._taken = state.get("taken", 0)
        batches = self._batches(state)
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - started
            if batch is None:
                return
            # Before the batch is given away, so that a state which is saved during its step covers it.
            self._taken += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Returns the epoch and how many of its batches were given away."""
        return {"epoch": self.sampler.epoch, "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Has the next pass begin at ``state``, if the pass is of that state's epoch."""
        self._loaded = dict(state)

    def __len__(self) -> int:
        """Returns the number of batches in an epoch."""
        return len(self.sampler)

    @abstractmethod
    def _batches(self, state: dict[str, Any]) -> Iterator[Batch]:
        """Yields the batches of an epoch behind the first ``self._taken``, after which ``state`` was saved."""


class FeatureLoader(Loader):
    """Yields batches of features that have been computed before.

    ``fetch``: returns the features of some images, by number. ``prefetch``: on a GPU, the next batch is fetched on a
    stream of its own while a step works on the current one. ``offsets``: returns ``Batch.offsets``, by number.
    """

    def __init__(
        self,
        fetch: Callable[[list[int]], list[Tensor]],
        sampler: BatchSampler,
        prefetch: bool = False,
        *,
        offsets: Callable[[list[int]], Tensor | None] = lambda numbers: None,
    ) -> None:
        super().__init__(sampler)
        self._fetch = fetch
        self._offsets = offsets
        self._prefetch = prefetch

    def _batches(self, state: dict[str, Any]) -> Iterator[Batch]:
        chosen = self.sampler.batches(self._taken)
        batches = (Batch(self._fetch(numbers), numbers, weight, self._offsets(numbers)) for numbers, weight in chosen)
        return _prefetched(batches) if self._prefetch else batches


class ImageLoader(Loader):
    """Yields batches of images, which ``readers`` read when they are needed.

    ``decode``: makes pixels of a batch if ``images`` are encoded; None if they are not.
    """

    def __init__(
        self, images: ImageFileDataset, sampler: BatchSampler, readers: ReaderPool, decode: Decode | None = None
    ) -> None:
        super().__init__(sampler)
        self._decode = decode
        self._images = images
        self._readers = readers

    def _batches(self, state: dict[str, Any]) -> Iterator[Batch]:
        start, images = self._taken, self._images.in_epoch(self.sampler.epoch)
        # Drawn twice, as a list of all numbers would take much memory.
        requests = ([images.to_read(n) for n in numbers] for numbers, _ in self.sampler.batches(start))
        items = self._readers.read(requests, self._decode is not None)
        for (numbers, weight), batch in zip(self.sampler.batches(start), items, strict=True):
            yield Batch(_pixels(batch, self._decode)[0], numbers, weight, images.offsets(numbers))


class ShardLoader(Loader):
    """Yields batches of images out of shards.

    ``open_shards``: returns this process's images of an epoch. ``steps``: the number of batches of ``batch_size``
    images in an epoch; None: all images once, the last batch being smaller. ``decode``: makes pixels of a batch if the
    images are encoded. ``light_seed``: images are shown in changed light, drawn from it, the epoch and their numbers;
    None: as they are.

    Whole shards are dealt out, so processes have somewhat more or fewer images than ``steps`` take. A process that has
    more leaves some out, others in each epoch. A process that has fewer, or lost some to damaged files, begins again
    with its first image.

    Each worker ends with a batch of its own that may be smaller. These batches are joined in the workers' order and
    come last; only what is left behind whole batches, less than one, is left out. Images that cannot be decoded make
    their batch smaller.

    Raises: InputError if an image cannot be read and faults are not skipped, or if not one whole batch can be read.
    """

    def __init__(
        self,
        open_shards: Callable[[int], ShardedImages],
        batch_size: int,
        steps: int | None,
        *,
        world: ProcessGroup = SINGLE_PROCESS,
        decode: Decode | None = None,
        light_seed: int | None = None,
    ) -> None:
        super().__init__(EpochCounter())
        self._light_seed = light_seed
        self._world = world
        self._decode = decode
        self._open = open_shards
        self._batch_size = batch_size
        self._steps = steps
        self._images = open_shards(0)

    def __len__(self) -> int:
        if self._steps is not None:
            return self._steps
        return -(-sum(self._images.images_of_workers) // self._batch_size)

    def state_dict(self) -> dict[str, Any]:
        """Returns also the position in the shards, for each process; all processes must call this."""
        return {**super().state_dict(), "shards": list(self._world.all_gather(self._images.state()))}

    def _batches(self, state: dict[str, Any]) -> Iterator[Batch]:
        self._images = self._open(self.sampler.epoch)
        if state:
            self._images.resume(state["shards"][self._world.rank])
        # What is left behind a state may be less than a batch.
        whole = not state
        while self._steps is None or self._taken < self._steps:
            before = self._taken
            for batch in self._single_pass():
                if self._taken == self._steps:
                    return
                self._images.seen(batch)
                pixels, decoded = _pixels(batch, self._decode, partial(self._images.fault, lost=1))
                if decoded:
                    numbers = batch["index"][decoded].tolist()
                    yield Batch(self._lit(pixels, numbers), numbers, 1.0)
            if self._steps is None:
                return
            if self._taken == before and whole:
                raise InputError(
                    f"{self._images.location.root}: process {self._world.rank} finds less than {self._batch_size}"
                    " images that can be read, its part of a batch; mend the shards, or take a smaller batch"
                )
            whole = True
            self._images.set_epoch(self.sampler.epoch)

    def _lit(self, pixels: Tensor, numbers: list[int]) -> Tensor:
        if self._light_seed is None:
            return pixels
        lights = (draw_light(self._light_seed, self.sampler.epoch, number) for number in numbers)
        return torch.stack([light(image) for light, image in zip(lights, pixels, strict=True)])

    def _single_pass(self) -> Iterator[dict[str, Any]]:
        """Yields the images that are left of the shards in whole batches, and a smaller one if there are no steps."""
        collate = collate_encoded if self._decode else default_collate
        smaller: list[dict[str, Any]] = []
        held: list[dict[str, Any]] = []
        with AheadLoader(self._images, self._images.workers, collate, batch_size=self._batch_size) as loader:
            for batch in loader:
                if len(batch["index"]) < self._batch_size:
                    smaller.append(batch)
                    continue
                # Nobody asks behind an epoch's last batch: by then the shards are read to the end, and wrong ones
                # known.
                yield from held
                held = [batch]
        yield from held
        smaller.sort(key=lambda batch: int(batch["reader"][0]))
        items = [dict(zip(batch, item, strict=True)) for batch in smaller for item in zip(*batch.values(), strict=True)]
        for joined in batched(items, self._batch_size):
            if self._steps is None or len(joined) == self._batch_size:
                yield collate(list(joined))


def _pixels(
    batch: dict[str, Any], decode: Decode | None, on_fault: Callable[[InputError], None] | None = None
) -> tuple[Tensor, list[int]]:
    """Returns the images that can be decoded, and their indices in the batch. ``on_fault`` gets the others' errors;
    None: they are raised."""
    pixels, faults = (batch["image"], {}) if decode is None else decode(batch["image"], batch["source"])
    for error in faults.values():
        if on_fault is None:
            raise error
        on_fault(error)
    return pixels, [index for index in range(len(batch["image"])) if index not in faults]


def _prefetched(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yields ``batches``, the next of which is copied to the GPU on a stream of its own in the meantime."""
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())

    def fetch() -> Batch | None:
        with torch.cuda.stream(side_stream):
            return next(batches, None)

    coming = fetch()
    while coming is not None:
        current_stream, batch = torch.cuda.current_stream(), coming
        current_stream.wait_stream(side_stream)
        for level in batch.inputs:
            # Its memory is the side stream's, which must not give it away while the step reads it.
            level.record_stream(current_stream)
        coming = fetch()
        yield batch
