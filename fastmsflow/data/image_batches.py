"""Batches of images, read in order by worker processes ahead of whoever takes them."""

import os
import signal
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import InputError, UnavailableError
from ..files import as_utf8
from .image_io import as_tensor, decode_image
from .reader_pool import batched, identity
from .shards.manifest import Manifest, Shard
from .shards.reader import Encoded, read_shard
from .shards.storage import ShardStorage
from .url_images import open_image


@dataclass(frozen=True)
class ImageBatch:
    """Images that are to be read."""

    first: int
    """The number of its first image among all; the others follow it."""
    images: list[Encoded] | list[str]
    """Encoded as their files have them, or names of files and URLs."""
    lost: int = 0
    """The number of images behind these that cannot be had."""
    fault: str | None = None
    """Says why they are lost."""


def file_batches(names: Sequence[str], size: int) -> Iterator[ImageBatch]:
    """Yields ``names``, of files or URLs, ``size`` at once."""
    for number, batch in enumerate(batched(names, size)):
        yield ImageBatch(number * size, list(batch))


class ShardBatches:
    """Batches of a set of shards; an image's name is its shard's and its own. A shard that is damaged, cut off or
    missing loses images, and its last batch says so.

    ``where``: see fastmsflow.data.shards.storage.ShardStorage. Errors: InputError where there is no manifest, or it is
    wrong; UnavailableError where a package is missing that reads shards.
    """

    def __init__(self, where: str) -> None:
        if find_spec("webdataset") is None:
            raise UnavailableError("shards need webdataset: pip install 'fastmsflow[shards]'")
        self.location = ShardStorage(where)
        self.manifest = Manifest.read(self.location)

    def name(self, shard: Shard) -> str:
        """Returns the shard's file or URL."""
        return self.location.name(shard.name)

    def batches(self, shard: Shard, size: int, done: Container[str] = ()) -> Iterator[ImageBatch]:
        """Yields the images of ``shard``, ``size`` at once, but for those whose names, as UTF-8, are ``done``."""
        tar = self.name(shard)
        first, read, seen, fault = shard.first, list[Encoded](), 0, None
        try:
            for encoded in read_shard(self.location, shard):
                seen += 1
                named = replace(encoded, name=f"{tar}/{encoded.name}")
                if as_utf8(named.name) in done:
                    continue
                # Kept back until there are more: that a shard is damaged may show at its very end.
                if len(read) == size:
                    yield ImageBatch(first, read)
                    first, read = first + size, []
                read.append(named)
        except InputError as error:
            fault = str(error)
        if fault:
            # A wrong checksum alone loses no image, but one of them may be wrong: that has a row too.
            yield ImageBatch(first, read, max(1, shard.images - seen), fault)
        elif read:
            yield ImageBatch(first, read)


class ReadImage(NamedTuple):
    """An image that was, or could not be, read."""

    number: int
    """Among all images."""
    name: str | None
    """None for one that is lost with its shard."""
    size: tuple[int, int] | None
    """(width, height) of the file's pixels; None where it cannot be read."""
    fault: str | None
    shown: np.ndarray | None = None
    """(h, w, 3) uint8, what ``BatchReader.shrink`` made of it."""


@dataclass(frozen=True)
class ReadBatch:
    """A batch, read."""

    items: list[ReadImage]
    pixels: Tensor | None
    """float32 (n, 3, H, W) in [0, 1], of the n items that could be read, in their order."""


Shrink = Callable[[Image.Image], Image.Image]


class BatchReader(Dataset[ReadBatch]):
    """Batches -> their images at ``image_size`` (H, W), resized by Lanczos: ``reader[batch]``, for a DataLoader.

    ``shrink``: makes of each RGB image another, to be shown; None: none is.
    """

    def __init__(self, image_size: tuple[int, int], shrink: Shrink | None = None) -> None:
        self.image_size = image_size
        self.shrink = shrink

    def __getitem__(self, batch: ImageBatch) -> ReadBatch:
        items: list[ReadImage] = []
        pixels: list[Tensor] = []
        images: Sequence[Encoded | str] = batch.images
        for number, image in enumerate(images, batch.first):
            name, read = _reading(image)
            try:
                found = read()
                shown = None if self.shrink is None else np.asarray(self.shrink(found))
                pixels.append(as_tensor(found, self.image_size))
                items.append(ReadImage(number, name, found.size, None, shown))
            except InputError as error:
                items.append(ReadImage(number, name, None, str(error)))
        behind = batch.first + len(batch.images)
        items += [ReadImage(number, None, None, batch.fault) for number in range(behind, behind + batch.lost)]
        stacked = torch.stack(pixels) if pixels else None
        return ReadBatch(items, stacked)


def _reading(image: Encoded | str) -> tuple[str, Callable[[], Image.Image]]:
    if isinstance(image, str):
        return image, lambda: open_image(image)
    return image.name, lambda: decode_image(image.content, image.source)


def read_batches(
    batches: Iterable[ImageBatch], count: int, reader: BatchReader, workers: int
) -> Generator[ReadBatch, None, None]:
    """The ``count`` batches, in order, read by ``workers`` processes ahead of whoever takes them, no more of them than
    there are processors; by this one where ``workers`` is 0 or there is but one batch, so nothing to be ahead with.

    Errors: RuntimeError, see fastmsflow.errors.in_one_line, where one of the processes is killed.
    """
    if not count:
        return
    # The loader's sampler runs in this process, and what it draws goes to the workers as it is.
    yield from DataLoader(
        reader,
        batch_size=None,
        sampler=batches,
        num_workers=min(workers, count - 1, processors()),
        collate_fn=identity,
        worker_init_fn=_leave_interruptions,
    )


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _leave_interruptions(worker: int) -> None:
    """To the process that the worker reads for, which ends it; a terminal sends Ctrl-C to them all."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
