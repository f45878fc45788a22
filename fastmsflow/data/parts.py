"""Images of any number, read by worker processes in order, and cut into parts that several processes share out.

A part is one shard, or so many names of a list. Nothing of other parts is in memory.
"""

import hashlib
import os
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import InputError, UnavailableError
from ..files import written_aside
from .images import as_tensor, decode_image, read_image
from .locations import Location
from .manifest import Manifest, Shard
from .sources import listed_names
from .tars import Encoded, read_shard

CHUNK = 2**20


@dataclass(frozen=True)
class Batch:
    """Images of one part, to be read."""

    part: int
    first: int
    """The number of its first image among all; the others follow it."""
    images: list[Encoded] | list[str]
    """As files have them, or the files' names."""
    last: bool
    """Of its part."""
    lost: int = 0
    """Images of the part behind these that cannot be had."""
    fault: str | None = None
    """What is wrong with the part as a whole."""


class Parts(Protocol):
    """Where the images come from; to be had in every process."""

    @property
    def kind(self) -> str:
        """In one word."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of which images there are, in which order: 16 hexadecimal digits."""
        ...

    @property
    def images(self) -> Sequence[int]:
        """Of each part."""
        ...

    def batches(self, parts: Sequence[int], size: int) -> Iterator[Batch]:
        """The images of ``parts``, which must ascend, ``size`` at once, each part's last ones fewer."""
        ...


@dataclass(frozen=True)
class ShardParts:
    """Each shard is a part. A shard that is damaged, cut off or missing loses images, and says so."""

    location: Location
    shards: Sequence[Shard]
    images: Sequence[int]
    fingerprint: str
    kind = "shards"

    @classmethod
    def of(cls, where: str) -> "ShardParts":
        """``where``: as fastmsflow.data.locations.Location has it. Errors: InputError where there is no manifest, or
        it is wrong; UnavailableError where a package is missing that reads them."""
        if find_spec("webdataset") is None:
            raise UnavailableError("shards need webdataset: pip install 'fastmsflow[shards]'")
        location = Location(where)
        manifest = Manifest.read(location)
        return cls(location, manifest.shards, [shard.images for shard in manifest.shards], manifest.content)

    def batches(self, parts: Sequence[int], size: int) -> Iterator[Batch]:
        for part in parts:
            yield from self._of(part, self.shards[part], size)

    def _of(self, part: int, shard: Shard, size: int) -> Iterator[Batch]:
        first, read, fault = shard.first, list[Encoded](), None
        try:
            for encoded in read_shard(self.location, shard):
                # Kept back until there are more: that a shard is damaged may show at its very end.
                if len(read) == size:
                    yield Batch(part, first, read, last=False)
                    first, read = first + size, []
                read.append(encoded)
        except InputError as error:
            fault = str(error)
        lost = shard.first + shard.images - first - len(read)
        yield Batch(part, first, read, True, lost, fault)


@dataclass(frozen=True)
class ListedParts:
    """Files by name, ``per_part`` to a part, listed in ``file``: each name before a NUL."""

    file: Path
    per_part: int
    images: Sequence[int]
    fingerprint: str
    kind = "files"

    @classmethod
    def of(cls, names: Sequence[Path], per_part: int, file: Path) -> "ListedParts":
        """``file`` is where ``write`` lists them."""
        total = hashlib.sha256()
        for name in names:
            total.update(os.fsencode(os.path.abspath(name)) + b"\0")  # noqa: PTH100 - links stay what they are
        images = [min(per_part, len(names) - start) for start in range(0, len(names), per_part)]
        return cls(file, per_part, images, total.hexdigest()[:16])

    def write(self, names: Iterable[Path]) -> None:
        """Errors: InputError, as ``written_aside`` has it."""
        with written_aside(self.file) as aside, aside.open("wb") as file:
            file.writelines(os.fsencode(name) + b"\0" for name in names)

    def batches(self, parts: Sequence[int], size: int) -> Iterator[Batch]:
        names, at = _listed(self.file), 0
        for part in parts:
            first, here = part * self.per_part, self.images[part]
            chosen = list(islice(names, first - at, first - at + here))
            at = first + here
            for start in range(0, here, size):
                yield Batch(part, first + start, chosen[start : start + size], last=start + size >= here)


def _listed(file: Path) -> Iterator[str]:
    rest = b""
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            whole, _, rest = (rest + chunk).rpartition(b"\0")
            yield from listed_names(whole, null=True)


class Item(NamedTuple):
    """An image that was, or could not be, read."""

    number: int
    """Among all images."""
    name: str | None
    """None for one that is lost with its shard."""
    size: tuple[int, int] | None
    """(width, height) of the file's pixels; None where it cannot be read."""
    fault: str | None
    shown: np.ndarray | None = None
    """(h, w, 3) uint8, what ``Reader.shrink`` made of it."""


@dataclass(frozen=True)
class Read:
    """A batch, read."""

    part: int
    items: list[Item]
    pixels: Tensor | None
    """float32 (n, 3, H, W) in [0, 1], of the n items that could be read, in their order."""
    last: bool
    lost: int
    fault: str | None


Shrink = Callable[[Image.Image], Image.Image]


class Reader(Dataset[Read]):
    """Batches -> their images at ``image_size`` (H, W), resized by Lanczos: ``reader[batch]``, for a DataLoader.

    ``shrink``: makes of each RGB image another, to be shown; None: none is.
    """

    def __init__(self, image_size: tuple[int, int], shrink: Shrink | None = None) -> None:
        self.image_size = image_size
        self.shrink = shrink

    def __getitem__(self, batch: Batch) -> Read:
        items: list[Item] = []
        pixels: list[Tensor] = []
        images: Sequence[Encoded | str] = batch.images
        for number, image in enumerate(images, batch.first):
            name, read = _reading(image)
            try:
                found = read()
                shown = None if self.shrink is None else np.asarray(self.shrink(found))
                pixels.append(as_tensor(found, self.image_size))
                items.append(Item(number, name, found.size, None, shown))
            except InputError as error:
                items.append(Item(number, name, None, str(error)))
        behind = batch.first + len(batch.images)
        items += [Item(number, None, None, batch.fault) for number in range(behind, behind + batch.lost)]
        stacked = torch.stack(pixels) if pixels else None
        return Read(batch.part, items, stacked, batch.last, batch.lost, batch.fault)


def _reading(image: Encoded | str) -> tuple[str, Callable[[], Image.Image]]:
    if isinstance(image, str):
        return image, lambda: read_image(image)
    return image.name, lambda: decode_image(image.content, image.source)


def read_parts(
    source: Parts, parts: Sequence[int], size: int, image_size: tuple[int, int], workers: int
) -> Iterator[Read]:
    """The images of ``parts``, in order, ``size`` at once; ``workers``: see ``read_batches``."""
    count = sum(-(-source.images[part] // size) for part in parts)
    return read_batches(source.batches(parts, size), count, Reader(image_size), workers)


def read_batches(batches: Iterable[Batch], count: int, reader: Reader, workers: int) -> Generator[Read, None, None]:
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
        collate_fn=_as_it_is,
        worker_init_fn=_leave_interruptions,
    )


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _leave_interruptions(worker: int) -> None:
    """To the process that the worker reads for, which ends it; a terminal sends Ctrl-C to them all."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(read: Any) -> Any:
    return read
