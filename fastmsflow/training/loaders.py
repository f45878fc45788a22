"""Batches for a trainer, from wherever they come: each loader knows where in its epoch it stands, and goes on there."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..data import ShardedImages
from ..errors import InputError
from ..world import ALONE, World
from .features import Images
from .order import InTurn, Order
from .readers import Readers, encoded_together, survive_one_sigterm

# Features per level, (B, C_l, H_l, W_l), or images, (B, 3, H, W); the images' numbers; see Part.share.
Batch = tuple[list[Tensor] | Tensor, list[int], float]
# Of what jpegs.decoded_or_not made of some images, (B, 3, H, W).
Decode = Callable[[list[Tensor]], Tensor]


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

    def __init__(self, fetch: Callable[[list[int]], list[Tensor]], order: Order | InTurn, ahead: bool = False) -> None:
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

    def __init__(self, images: Images, order: Order | InTurn, readers: Readers, decode: Decode | None = None) -> None:
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
            yield _pixels(batch["image"], self._decode), *part


class Epoch:
    """What Lightning tells the epoch's number."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class ShardLoader(Loader):
    """Batches of images out of shards; ``open_shards``: this process's, of an epoch.

    ``steps``: how many batches of ``batch_size`` images an epoch has. Whole shards are dealt out, so that processes
    have somewhat more or fewer images than they need for them: one that has more leaves some out, others in each epoch;
    one that has fewer, or lost some to damaged files, begins again with the first. None: what there is, once.
    """

    def __init__(
        self,
        open_shards: Callable[[int], ShardedImages],
        batch_size: int,
        steps: int | None,
        world: World = ALONE,
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
        # Each worker has a last batch of its own.
        return sum(-(-count // self._batch_size) for count in self._images.images_of_workers)

    def state_dict(self) -> dict[str, Any]:
        """Also where in the shards that is, for each process: to be called on all of them."""
        return {**super().state_dict(), "shards": list(self._world.gathered(self._images.state()))}

    def _batches(self, state: dict[str, Any]) -> Iterator[Batch]:
        self._images = self._open(self._epoch)
        if state:
            self._images.resume(state["shards"][self._world.rank])
        given = state.get("taken", 0)
        # What is left behind a state may be less than a batch.
        whole = not state
        while self._steps is None or given < self._steps:
            before = given
            for batch in self._loader():
                if given == self._steps:
                    return
                self._images.seen(batch)
                given += 1
                yield _pixels(batch["image"], self._decode), batch["index"].tolist(), 1.0
            if self._steps is None:
                return
            if given == before and whole:
                raise InputError(
                    f"{self._images.location.root}: no worker finds {self._batch_size} images that can be read, a batch"
                    " of this process; take fewer workers or a smaller batch"
                )
            whole = True
            self._images.set_epoch(self._epoch)

    def _loader(self) -> DataLoader[Any]:
        return DataLoader(
            self._images,
            self._batch_size,
            num_workers=self._images.workers,
            drop_last=self._steps is not None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=survive_one_sigterm,
            collate_fn=encoded_together if self._decode else None,
        )


def _pixels(images: Tensor | list[Tensor], decode: Decode | None) -> Tensor:
    if isinstance(images, Tensor):
        return images
    assert decode is not None
    return decode(images)


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
