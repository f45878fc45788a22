"""Reads batches of images ahead of the model, in worker processes, for predictions.

A file that cannot be read is reported, and the rest of its batch goes on.
"""

import os
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import InputError
from ..files import as_utf8
from ..number_range import WORKERS
from ..tiling import Tiling
from .ahead_loader import show_life
from .image_io import as_tensor, decode_image
from .image_views import ScaledImage, scaled_pixels
from .reader_pool import ReaderPool, batched
from .shards.manifest import Manifest, Shard
from .shards.reader import Encoded, read_shard
from .shards.storage import ShardStorage, check_installed
from .url_images import open_image


@dataclass(frozen=True)
class ImageBatch:
    """Images that are still to be read."""

    first: int
    """The number of the batch's first image among all; the others follow it."""
    images: Sequence[Encoded | str]
    """The contents of image files, or names of files and URLs."""
    lost: int = 0
    """The number of images behind these that cannot be read."""
    fault: str | None = None
    """The reason why they are lost."""


def file_batches(names: Sequence[str], size: int) -> Iterator[ImageBatch]:
    """Yields ``names``, of files or URLs, as batches of ``size``."""
    for number, batch in enumerate(batched(names, size)):
        yield ImageBatch(number * size, list(batch))


class ShardBatches:
    """Batches of a set of shards; an image's name is its shard's name and its own.

    A shard that is damaged, cut off or missing loses images, and its last batch says so. ``where``: see
    fastmsflow.data.shards.storage.ShardStorage. Raises: InputError if there is no manifest or it is wrong, and
    UnavailableError if a package is missing that reads shards.
    """

    def __init__(self, where: str) -> None:
        check_installed()
        self.location = ShardStorage(where)
        self.manifest = Manifest.read(self.location)

    def name(self, shard: Shard) -> str:
        """Returns the shard's file or URL."""
        return self.location.name(shard.name)

    def batches(self, shard: Shard, size: int, done: Container[str] = ()) -> Iterator[ImageBatch]:
        """Yields the images of ``shard`` as batches of ``size``, without those whose names, as UTF-8, are ``done``."""
        tar = self.name(shard)
        first, read, seen = shard.first, list[Encoded](), 0
        lost, fault = 0, None
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
            # A wrong checksum alone loses no image, but one of them may be wrong: that has a row too.
            lost, fault = max(1, shard.images - seen), str(error)
        while read or lost:
            # The manifest alone says how many are lost: they need not fit into the memory.
            batch = ImageBatch(first, read, min(lost, size), fault)
            yield batch
            first, read, lost = first + len(read) + batch.lost, [], lost - batch.lost


class ReadImage(NamedTuple):
    """An image that was read, or could not be."""

    number: int
    """The image's number among all."""
    name: str | None
    """The image's name; None for an image that is lost with its shard."""
    size: tuple[int, int] | None
    """(width, height) of the file's pixels; None if the image cannot be read."""
    fault: str | None
    shown: np.ndarray | None = None
    """(h, w, 3) uint8, what ``BatchReader.shrink`` made of the image."""


@dataclass(frozen=True)
class ReadBatch:
    """A batch of images that was read."""

    items: list[ReadImage]
    pixels: Tensor | None
    """float32 (n, 3, H, W) in [0, 1]: the n images that could be read, in their order; None if there are none, or they
    are to be cut into tiles."""
    to_cut: Sequence[ScaledImage] = ()
    """These images, each of its own size, if they are to be cut."""


Shrink = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True)
class BatchReader(Dataset[ReadBatch]):
    """Reads batches at ``image_size`` (H, W), resized by Lanczos: ``reader[batch]``.

    ``shrink``: makes another RGB image of each one, to be shown; None: no image is shown. ``tiling``: images are read
    at its scale, to be cut by it; None: they are resized.
    """

    image_size: tuple[int, int]
    shrink: Shrink | None = None
    tiling: Tiling | None = None

    def __getitem__(self, batch: ImageBatch) -> ReadBatch:
        items: list[ReadImage] = []
        pixels: list[Tensor] = []
        to_cut: list[ScaledImage] = []
        for number, image in enumerate(batch.images, batch.first):
            name = image if isinstance(image, str) else image.name
            try:
                found = open_image(image) if isinstance(image, str) else decode_image(image.content, image.source)
                shown = None if self.shrink is None else np.asarray(self.shrink(found))
                if self.tiling is None:
                    pixels.append(as_tensor(found, self.image_size))
                else:
                    to_cut.append(scaled_pixels(found, self.tiling, name))
                items.append(ReadImage(number, name, found.size, None, shown))
            except InputError as error:
                items.append(ReadImage(number, name, None, str(error)))
            show_life()
        behind = batch.first + len(batch.images)
        items += [ReadImage(number, None, None, batch.fault) for number in range(behind, behind + batch.lost)]
        return ReadBatch(items, torch.stack(pixels) if pixels else None, to_cut)


def read_batches(
    batches: Iterable[ImageBatch], count: int, reader: BatchReader, workers: int
) -> Generator[ReadBatch, None, None]:
    """Yields the ``count`` batches, read in order by ``workers`` processes ahead of the caller.

    No more processes start than there are processors. This process reads if ``workers`` is 0 or there is one batch, as
    nothing is to be ahead of. Raises: RuntimeError, see fastmsflow.errors.in_one_line, if one of the processes is
    killed.
    """
    WORKERS.check("workers", workers)
    with ReaderPool(min(workers, max(0, count - 1), processors()), dataset=reader) as readers:
        yield from readers.map(batches)


def processors() -> int:
    """Returns the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
