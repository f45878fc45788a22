"""Batches for a trainer, from wherever they come: each loader knows where in its epoch it stands, and goes on there."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from ..data import ShardedImages
from ..data.datasets import Images
from ..data.reader_pool import ReaderPool, collate_encoded, survive_sigterm
from ..distributed.process_group import SINGLE_PROCESS, ProcessGroup
from ..errors import InputError
from .samplers import SequentialBatchSampler, TrainBatchSampler

# Features per level, (B, C_l, H_l, W_l), or images, (B, 3, H, W); the images' numbers; see Part.share.
Batch = tuple[list[Tensor] | Tensor, list[int], float]
# See jpegs.decoded: of what jpegs.decoded_or_not made of some images, and what errors call these.
Decode = Callable[[list[Tensor], list[str]], tuple[Tensor, dict[int, InputError]]]


class Loader(ABC):
    """Batches of one epoch after the other. Lightning keeps ``state_dict`` with a run's state."""

    # Lightning looks for both, and calls set_epoch of the first.
    sampler: Any
    batch_sampler = None

    def __init__(self) -> None:
        self.waited = 0.0
        """For batches, by whoever asked for them, in seconds."""
        self._taken = 0
        self._loaded: dict[str, Any] = {}

    def __iter__(self) -> Iterator[Batch]:
        # A state of an epoch's end is none of the next one's middle.
        state = self._loaded if self._loaded.get("epoch") == self._epoch else {}
        self._loaded = {}
        self._taken = state.get("taken", 0)
        batches = self._batches(state)
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - started
            if batch is None:
                return
            # Before it is given away: a state that is kept while it is worked on covers it.
            self._taken += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The epoch and how many of its batches were given away."""
        return {"epoch": self._epoch, "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """For the next pass, if it is of the state's epoch."""
        self._loaded = dict(state)

    @property
    def _epoch(self) -> int:
        return self.sampler.epoch

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _batches(self, state: dict[str, Any]) -> Iterator[Batch]:
        """Of an epoch, or what is left of it behind ``state``."""


class FeatureLoader(Loader):
    """Batches of features that lie ready. ``fetch``: those of some images, by number."""

    def __init__(
        self,
        fetch: Callable[[list[int]], list[Tensor]],
        order: TrainBatchSampler | SequentialBatchSampler,
        ahead: bool = False,
    ) -> None:
        """``ahead``: on a GPU, the next batch is fetched on a stream of its own while a step works on this one."""
        super().__init__()
        self.sampler = order
        self._fetch = fetch
        self._ahead = ahead

    def __len__(self) -> int:
        return len(self.sampler)

    def _batches(self, state: dict[str, Any]) -> Iterator[Batch]:
        parts = self.sampler.parts(state.get("taken", 0))
        batches = ((self._fetch(part.numbers), *part) for part in parts)
        return _fetched_ahead(batches) if self._ahead else batches


class ImageLoader(Loader):
    """Batches of images, read by ``readers`` when they are needed."""

    def __init__(
        self,
        images: Images,
        order: TrainBatchSampler | SequentialBatchSampler,
        readers: ReaderPool,
        decode: Decode | None = None,
    ) -> None:
        """``decode``: where ``images`` are encoded, what makes pixels of a batch."""
        super().__init__()
        self.sampler = order
        self._decode = decode
        self._images = images
        self._readers = readers

    def __len__(self) -> int:
        return len(self.sampler)

    def _batches(self, state: dict[str, Any]) -> Iterator[Batch]:
        start = state.get("taken", 0)
        asked = ([self._images.to_read(number) for number in part.numbers] for part in self.sampler.parts(start))
        batches = self._readers.read(asked, self._decode is not None)
        for part, batch in zip(self.sampler.parts(start), batches, strict=True):
            yield _pixels(batch, self._decode)[0], *part


class Epoch:
    """What Lightning tells the epoch's number."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class ShardLoader(Loader):
    """Batches of images out of shards; ``open_shards``: this process's, of an epoch.

    ``steps``: how many batches of ``batch_size`` images an epoch has. Whole shards are dealt out, so that processes
    have somewhat more or fewer images than they need for them: one that has more leaves some out, others in each epoch;
    one that has fewer than its part, or lost some to damaged files, begins again with its first. None: what there is,
    once, in a last batch fewer.

    Each of the workers that read has a last batch of its own, of fewer images: these come last, in the workers' order,
    and joined; of them only what is left behind whole batches, less than one, is left out. Images that cannot be
    decoded make their batch smaller.

    Errors: InputError where an image cannot be read, and faults are not skipped; where not one whole batch can.
    """

    def __init__(
        self,
        open_shards: Callable[[int], ShardedImages],
        batch_size: int,
        steps: int | None,
        world: ProcessGroup = SINGLE_PROCESS,
        decode: Decode | None = None,
    ) -> None:
        """``decode``: where the images are encoded, what makes pixels of a batch."""
        super().__init__()
        self._world = world
        self._decode = decode
        self.sampler = Epoch()
        self._open = open_shards
        self._batch_size = batch_size
        self._steps = steps
        self._images = open_shards(0)

    def __len__(self) -> int:
        if self._steps is not None:
            return self._steps
        return -(-sum(self._images.images_of_workers) // self._batch_size)

    def state_dict(self) -> dict[str, Any]:
        """Also where in the shards that is, for each process: to be called on all of them."""
        return {**super().state_dict(), "shards": list(self._world.all_gather(self._images.state()))}

    def _batches(self, state: dict[str, Any]) -> Iterator[Batch]:
        self._images = self._open(self._epoch)
        if state:
            self._images.resume(state["shards"][self._world.rank])
        given = state.get("taken", 0)
        # What is left behind a state may be less than a batch.
        whole = not state
        while self._steps is None or given < self._steps:
            before = given
            for batch in self._once():
                if given == self._steps:
                    return
                self._images.seen(batch)
                pixels, places = _pixels(batch, self._decode, partial(self._images.fault, lost=1))
                if places:
                    given += 1
                    yield pixels, batch["index"][places].tolist(), 1.0
            if self._steps is None:
                return
            if given == before and whole:
                raise InputError(
                    f"{self._images.location.root}: process {self._world.rank} finds less than {self._batch_size}"
                    " images that can be read, its part of a batch; mend the shards, or take a smaller batch"
                )
            whole = True
            self._images.set_epoch(self._epoch)

    def _once(self) -> Iterator[dict[str, Any]]:
        """All images, or what is left of them, in whole batches; a last one of fewer where there are no ``steps``."""
        collate = collate_encoded if self._decode else default_collate
        loader = DataLoader(
            self._images,
            self._batch_size,
            num_workers=self._images.workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=survive_sigterm,
            collate_fn=collate,
        )
        rest: list[dict[str, Any]] = []
        held: list[dict[str, Any]] = []
        for batch in loader:
            if len(batch["index"]) < self._batch_size:
                rest.append(batch)
                continue
            # Nobody asks behind an epoch's last batch: by then the shards are read to the end, and wrong ones known.
            yield from held
            held = [batch]
        yield from held
        rest.sort(key=lambda batch: int(batch["reader"][0]))
        items = [dict(zip(batch, item, strict=True)) for batch in rest for item in zip(*batch.values(), strict=True)]
        for start in range(0, len(items), self._batch_size):
            if self._steps is None or start + self._batch_size <= len(items):
                yield collate(items[start : start + self._batch_size])


def _raised(error: InputError) -> None:
    raise error


def _pixels(
    batch: dict[str, Any], decode: Decode | None, fault: Callable[[InputError], None] = _raised
) -> tuple[Tensor, list[int]]:
    """Of the images that can be decoded, and their places in the batch; ``fault`` is told what is wrong with others."""
    if decode is None:
        return batch["image"], list(range(len(batch["image"])))
    pixels, faults = decode(batch["image"], batch["source"])
    for error in faults.values():
        fault(error)
    return pixels, [place for place in range(len(batch["image"])) if place not in faults]


def _fetched_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """On a GPU: the next one is copied and standardised on a stream of its own while a step works on this one."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    coming = _next(batches, aside)
    while coming is not None:
        here, batch = torch.cuda.current_stream(), coming
        here.wait_stream(aside)
        for level in batch[0]:
            # Its memory is the side stream's, which must not give it away while the step reads it.
            level.record_stream(here)
        coming = _next(batches, aside)
        yield batch


def _next(batches: Iterator[Batch], stream: torch.cuda.Stream) -> Batch | None:
    with torch.cuda.stream(stream):
        return next(batches, None)
