"""Reads images out of shards, for a DataLoader: from first byte to last, by rank and worker, wherever the shards
lie."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from ...errors import InputError
from ...number_range import COUNT, WORKERS
from ...settings_diff import changed_settings
from ..ahead_loader import show_life
from ..error_log import ErrorLog
from ..image_io import as_tensor, decode_image
from ..jpeg_decoder import encoded_or_pixels
from .manifest import Manifest, Shard, content_of
from .reader import Encoded, read_shard
from .shuffle import shuffle_buffer, shuffled_by
from .storage import ShardStorage, check_installed


class ShardedImages(IterableDataset[dict[str, Any]]):
    """The images of a set of shards at ``image_size`` (H, W), resized by Lanczos, for one rank of ``world_size``.

    Items: ``image`` (3, H, W) float32 in [0, 1]; ``index``, the image's number in the set; ``name``, its path when the
    shards were written; ``source``, its shard and name, for errors; ``reader`` and ``position``, which ``state`` is
    made of.

    Every epoch of a seed has its own order: shards are shuffled, dealt out to the ranks and then to their workers, and
    each worker draws from a buffer of ``buffer`` encoded images. The order depends on the manifest, ``seed``,
    ``epoch``, ``buffer``, ``world_size`` and ``workers``, and on nothing else. With ``shuffle=False`` each worker's
    shards and images keep the manifest's order.

    ``where``: a folder, a URL that fsspec reads (http://, s3://, ...; ``options``: what its file system takes), either
    with or without ``/manifest.json``, or ``pipe:COMMAND`` with ``{}`` for a file's name. ``workers``: the DataLoader's
    ``num_workers``. ``verify``: a shard is copied to a temporary file and its checksum compared before any image of it
    is used; otherwise the checksum is compared when the shard's end is read, after its images. ``skip_faults``: a file;
    shards and images that cannot be read are left out and logged there, a line of JSON each, as is a shard with a wrong
    checksum. None: they are errors. ``manifest``: the manifest if it was read before. ``shards``: the shards of the
    manifest to read; None: all. ``encoded``: ``image`` is what ``jpeg_decoder.decode_batch`` takes.

    Raises: InputError if there are fewer shards than ranks, the manifest is wrong, or, on reading, a shard or an image
    is, with its name; UnavailableError if a package is missing that reads shards.
    """

    def __init__(
        self,
        where: str | Path,
        image_size: tuple[int, int],
        *,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        seed: int = 0,
        epoch: int = 0,
        shuffle: bool = True,
        buffer: int = 1000,
        verify: bool = False,
        skip_faults: str | Path | None = None,
        options: dict[str, Any] | None = None,
        manifest: Manifest | None = None,
        shards: Sequence[Shard] | None = None,
        encoded: bool = False,
    ) -> None:
        check_installed()
        for name, count in (("world_size", world_size), ("buffer", buffer)):
            COUNT.check(name, count)
        WORKERS.check("workers", workers)
        if not 0 <= rank < world_size:
            raise InputError(f"rank {rank} of {world_size} ranks; ranks count from 0")
        self.location = ShardStorage(where, options)
        self.manifest = manifest or Manifest.read(self.location)
        self.shards = self.manifest.shards if shards is None else tuple(shards)
        if len(self.shards) < world_size:
            raise InputError(
                f"{world_size} ranks, {len(self.shards)} shards: some ranks would have no data; write {world_size}"
                f" shards or more (--images-per-shard {max(1, self.manifest.images // world_size)} or less), or take"
                " fewer ranks"
            )
        self.image_size = image_size
        self.rank, self.world_size = rank, world_size
        self.workers = workers
        self.readers = max(1, workers)
        self.seed = seed
        self.shuffle, self.buffer = shuffle, buffer
        self.verify = verify
        self._error_log = None if skip_faults is None else ErrorLog(skip_faults)
        self._encoded = encoded
        self._started_in: int | None = None
        self.set_epoch(epoch)

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch. Not to be called while a DataLoader is reading."""
        self.epoch = epoch
        self._taken = [0] * self.readers
        self._next = 0

    @property
    def images_of_ranks(self) -> tuple[int, ...]:
        """The number of images of each rank in this epoch. Whole shards are dealt out, so the numbers differ by up to a
        shard; ranks that wait for each other may each take the least of these."""
        return tuple(sum(shard.images for shard in self._shards_of(rank)) for rank in range(self.world_size))

    @property
    def images_of_workers(self) -> tuple[int, ...]:
        """The number of images of each worker of this rank in this epoch; without workers, of this process."""
        own = self._shards_of(self.rank)
        return tuple(sum(shard.images for shard in own[reader :: self.readers]) for reader in range(self.readers))

    def seen(self, batch: Mapping[str, Any]) -> None:
        """Counts a batch of the DataLoader, or an item, as taken: call this for each that ``state`` shall cover."""
        # Tensors or lists; of an item, numbers.
        readers, positions = (np.atleast_1d(batch[key]).tolist() for key in ("reader", "position"))
        for reader, position in zip(readers, positions, strict=True):
            self._taken[reader] = max(self._taken[reader], position)
            # A DataLoader goes round its workers.
            self._next = (reader + 1) % self.readers

    def state(self) -> dict[str, Any]:
        """Returns this rank's position in its epoch, for ``resume``: numbers and text, good for JSON."""
        return {**self._settings(), "epoch": self.epoch, "taken": list(self._taken), "next": self._next}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Continues behind what ``state`` says is taken, with the same images in the same order as if never
        interrupted.

        Raises: InputError if the shards, the order, the ranks or the workers differ from those of the state: images of
        an epoch are dealt out among these, so a change in its middle would repeat some images and lose others.
        """
        changes = changed_settings(state, self._settings(), only_now=True)
        taken = state.get("taken")
        if not changes and not (isinstance(taken, list) and len(taken) == self.readers):
            changes = f"positions of {self.readers} workers, there are {taken}"
        if changes:
            raise InputError(
                f"to go on within an epoch, shards must be read as before: {changes}; set them back, or"
                f" begin epoch {int(state.get('epoch', 0)) + 1} without the state"
            )
        self.set_epoch(int(state["epoch"]))
        self._taken = [int(count) for count in state["taken"]]
        self._next = int(state["next"])

    def fault(self, error: InputError, lost: int) -> None:
        """Logs ``error``, which costs ``lost`` images. Raises ``error`` if faults are not skipped."""
        if self._error_log is None:
            raise error
        self._error_log.add(error, lost, self.epoch, self.rank)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        reader = (self._worker_number() + self._next) % self.readers
        for position, encoded in self._stream(reader, self._taken[reader]):
            try:
                if self._encoded:
                    image = encoded_or_pixels(encoded.content, encoded.source, self.image_size)
                else:
                    image = as_tensor(decode_image(encoded.content, encoded.source), self.image_size)
            except InputError as error:
                self.fault(error, 1)
                continue
            yield {
                "image": image,
                "index": encoded.index,
                "name": encoded.name,
                "source": encoded.source,
                "reader": reader,
                "position": position,
            }

    def _worker_number(self) -> int:
        info = get_worker_info()
        workers = 0 if info is None else info.num_workers
        if max(1, workers) != self.readers:
            raise InputError(
                f"the DataLoader has {workers} workers, the shards are dealt out to {self.readers};"
                f" give ShardedImages(workers={workers})"
            )
        if info is None:
            return 0
        if self._started_in == os.getpid():
            raise InputError("a worker that lives on knows nothing of a new epoch; leave out persistent_workers")
        self._started_in = os.getpid()
        return info.id

    def _stream(self, reader: int, taken: int) -> Iterator[tuple[int, Encoded]]:
        """Yields images behind the first ``taken`` positions. Images that are lost have positions too, so that a fault
        that comes or goes between two runs moves no other image."""
        shards = self._shards_of(self.rank)[reader :: self.readers]
        # The same draws without reading show which shards are no longer needed.
        numbers = (i for i, shard in enumerate(shards) for _ in range(shard.images))
        drawn_by_shard = Counter(islice(self._shuffled(numbers, reader), taken))
        images = (
            encoded
            for i, shard in enumerate(shards)
            for encoded in (repeat(None, shard.images) if drawn_by_shard[i] == shard.images else self._read(shard))
        )
        for position, encoded in enumerate(self._shuffled(images, reader), 1):
            if position > taken and encoded is not None:
                yield position, encoded

    def _shuffled(self, items: Iterator[Any], reader: int) -> Iterator[Any]:
        key = f"{self.seed} {self.epoch} {self.rank} {reader}"
        return shuffle_buffer(items, self.buffer, key) if self.shuffle else items

    def _shards_of(self, rank: int) -> Sequence[Shard]:
        order = shuffled_by(self.shards, f"{self.seed} {self.epoch}") if self.shuffle else self.shards
        return order[rank :: self.world_size]

    def _read(self, shard: Shard) -> Iterator[Encoded | None]:
        """Yields as many items as the manifest says: None for each image that cannot be read."""
        count = 0
        try:
            for encoded in read_shard(self.location, shard, self.verify):
                count += 1
                show_life()
                yield encoded
        except InputError as error:
            self.fault(error, shard.images - count)
            yield from repeat(None, shard.images - count)

    def _settings(self) -> dict[str, Any]:
        return {
            "shards": content_of(self.shards),
            "world_size": self.world_size,
            "rank": self.rank,
            "workers": self.readers,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "buffer": self.buffer,
        }
