"""Shards as a set of images to learn from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError
from ..lazy_sequence import LazySequence
from .manifest import Manifest, Shard
from .reader import read_shard
from .shuffle import shuffled_by
from .storage import JOURNAL, MANIFEST, PIPE, ShardStorage

FIRST = "000000.tar"


@dataclass(frozen=True)
class ShardSet:
    """Good images in shards, see ShardedImages: too many to be kept, so read in every pass."""

    where: str
    """What ShardStorage takes."""
    manifest: Manifest
    """Of all its shards."""
    options: dict[str, Any] | None = None
    """What fsspec's file system takes."""
    image_size: tuple[int, int] = (512, 512)
    """(H, W) to resize to, unless the user says otherwise."""

    @classmethod
    def from_source(cls, where: str, options: dict[str, Any] | None = None) -> "ShardSet":
        """Errors: InputError where there is no manifest or it is wrong; UnavailableError where a package is missing
        that reads it."""
        return cls(where, Manifest.read(ShardStorage(where, options)), options)

    @property
    def name(self) -> str:
        """For reports."""
        return self.where

    def split(self, share: float, seed: int, processes: int) -> tuple[tuple[Shard, ...], tuple[Shard, ...]]:
        """-> (shards to train on, shards held out): whole ones, about ``share`` of them, at least one for each of
        ``processes`` if any. Which depends on ``seed`` alone.

        Errors: InputError where too few shards are there for it.
        """
        order = shuffled_by(range(len(self.manifest.shards)), f"held out {seed}")
        count = max(processes, round(share * len(order))) if share else 0
        if len(order) - count < processes:
            raise InputError(
                f"{self.where}: {len(order)} shards, too few for {processes} processes"
                + (" to train on some and hold some out" if count else "")
                + "; write smaller ones (`fastmsflow shard --images-per-shard`), or take fewer processes"
            )
        chosen = set(order[:count])
        shards = self.manifest.shards
        return (
            tuple(shard for i, shard in enumerate(shards) if i not in chosen),
            tuple(shard for i, shard in enumerate(shards) if i in chosen),
        )

    @property
    def names(self) -> LazySequence:
        """Of all images, by number, when the shards were written; for each that is asked for, its shard is read."""
        return LazySequence(self.manifest.images, self._name)

    def _name(self, number: int) -> str:
        shard = next(shard for shard in self.manifest.shards if number < shard.first + shard.images)
        location = ShardStorage(self.where, self.options)
        try:
            return next(image.name for image in read_shard(location, shard) if image.index == number)
        except (InputError, StopIteration):
            return f"image {number} in {location.name(shard.name)}"


def is_shard_set(source: str) -> bool:
    """Tells whether ``source`` names shards, as ``ShardSet.from_source`` takes them.

    These are a URL, ``pipe:COMMAND``, and a folder into which `fastmsflow shard` wrote, or its manifest.json; reading
    says so if the folder is not complete.
    """
    if "://" in source or source.startswith(PIPE):
        return True
    path = Path(source)
    folder = path.parent if path.name == MANIFEST else path
    # By name, as a folder of millions of images takes long to list. The first shard is missing where none of its
    # images could be read.
    if any((folder / name).is_file() for name in (FIRST, JOURNAL)):
        return True
    try:
        # Of another version too: reading it says so.
        return str(json.loads((folder / MANIFEST).read_bytes())["format"]).startswith("fastmsflow shards")
    except (OSError, ValueError, KeyError, TypeError):
        return False
