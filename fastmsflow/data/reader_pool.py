"""Processes that read images. A run starts them once, for all that it reads; so does a run of all classes."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate

from ..number_range import WORKERS
from .ahead_loader import AheadLoader, Requests, pickled, show_life
from .datasets import ImageFileDataset, ReadItem

BATCH_SIZE = 16
"""Images that go through an extractor at once where nobody asks for another number."""

T = TypeVar("T")


class ReaderPool(AbstractContextManager["ReaderPool"]):
    """Reads images by ``workers`` processes, or by this process if there are none.

    The processes start when they are first needed, and end with the block, or when one of them fails. They read for one
    caller at a time. ``generator`` gives PyTorch's loader its seeds; None: the global one. ``dataset``: gives ``map``
    the result of each request; by default the request is a function, and called.
    """

    def __init__(
        self, workers: int = 0, generator: torch.Generator | None = None, dataset: Dataset[Any] | None = None
    ) -> None:
        WORKERS.check("workers", workers)
        self._workers = workers
        self._generator = generator
        self._dataset = _Caller() if dataset is None else dataset
        self._requests = _CurrentRequests()
        self._loader: AheadLoader | None = None
        self._reading: Generator[Any, None, None] | None = None

    def read(self, batches: Iterable[list[ReadItem]], encoded: bool = False) -> Iterator[dict[str, Any]]:
        """Yields the items of each batch, collated. Batches are drawn as they are needed. A call ends the one before.

        ``encoded``: the images are not pixels yet but bytes of any length, so they are collated into a list. Raises:
        InputError if an item cannot be read; RuntimeError if a process is killed.
        """
        # A process gets the requests only, so that it need not know of an image before.
        return self.map(partial(_collated, items, encoded) for items in batches)

    def map(self, requests: Iterable[Any]) -> Iterator[Any]:
        """Yields the dataset's result for each request, in order. See ``read``."""
        self._stop()
        self._reading = self._results(iter(requests))
        return self._reading

    def _results(self, requests: Iterator[Any]) -> Generator[Any, None, None]:
        self._requests.current = map(pickled, requests) if self._workers else requests
        if self._loader is None:
            self._loader = AheadLoader(
                Requests(self._dataset) if self._workers else self._dataset,
                self._workers,
                _identity,
                batch_size=None,
                sampler=self._requests,
                persistent_workers=self._workers > 0,
                generator=self._generator,
            )
        try:
            yield from self._loader
        except Exception:
            # The processes' work is lost, and maybe one of them: others take their place.
            self._loader = None
            raise

    def end(self) -> None:
        """Ends the processes, whatever they are doing; others start when they are needed."""
        self._stop()
        if self._loader is not None:
            self._loader.end()
        self._loader = None

    def _stop(self) -> None:
        if self._reading is not None:
            self._reading.close()

    def __exit__(self, *error: object) -> None:
        self.end()


def read_images(
    images: ImageFileDataset,
    batches: Iterable[Sequence[int]],
    readers: ReaderPool | None = None,
    device: torch.device | None = None,
) -> Iterator[Tensor]:
    """Yields each of ``batches``, numbers of ``images``, as (B, 3, H, W) float32 in [0, 1].

    The pixels are in channels-last memory on ``device``, by default the CPU. ``readers``: the processes that read;
    None: this one, whose global random numbers stay as they are.
    Raises: InputError if an image cannot be read; RuntimeError if a process is killed.
    """
    pool = readers or ReaderPool(generator=torch.Generator())
    requests = ([images.to_read(number) for number in batch] for batch in batches)
    for items in pool.read(requests):
        yield items["image"].to(device or "cpu", memory_format=torch.channels_last)


def batched(items: Sequence[T], size: int = BATCH_SIZE) -> Iterator[Sequence[T]]:
    """Yields ``items`` in order, ``size`` at once; the last time what is left."""
    return (items[start : start + size] for start in range(0, len(items), size))


def collate_encoded(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Collates items as usual, but their images, which may be encoded and of any length, into a list."""
    rest = default_collate([{key: value for key, value in item.items() if key != "image"} for item in items])
    return {**rest, "image": [item["image"] for item in items]}


class _CurrentRequests(Sampler[Any]):
    """Iterates over whatever ``current`` is at the time: a DataLoader's sampler cannot be replaced."""

    current: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        return self.current


class _Caller(Dataset[Any]):
    def __getitem__(self, request: Callable[[], Any]) -> Any:
        return request()


def _identity(batch: T) -> T:
    return batch


def _collated(items: list[ReadItem], encoded: bool) -> dict[str, Any]:
    read_items = []
    for read in items:
        read_items.append(read())
        show_life()
    return (collate_encoded if encoded else default_collate)(read_items)
