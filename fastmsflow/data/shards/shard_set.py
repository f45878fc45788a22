"""An image set of shards, to train on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...files import shown
from ...schema import read_json_file
from ..lazy_sequence import LazySequence
from .manifest import Manifest, Shard
from .reader import read_shard
from .shuffle import shuffled_by
from .storage import JOURNAL, MANIFEST, PIPE, ShardStorage

FIRST_SHARD = "000000.tar"


@dataclass(frozen=True)
class ShardSet:
    """Good images in shards, see ShardedImages: too many to be held in memory, so they are read in every pass."""

    where: str
    """The set's place, as ShardStorage takes it."""
    manifest: Manifest
    """The manifest of all its shards."""
    options: dict[str, Any] | None = None
    """Options of fsspec's file system."""
    image_size: tuple[int, int] = (512, 512)
    """(H, W) to resize to, unless the user says otherwise."""

    @classmethod
    def from_source(cls, where: str, options: dict[str, Any] | None = None) -> "ShardSet":
        """Opens a set of shards. Raises: InputError if there is no manifest or it is wrong, and UnavailableError if a
        package is missing that reads it."""
        return cls(where, Manifest.read(ShardStorage(where, options)), options)

    @property
    def name(self) -> str:
        """The set's name, for reports."""
        return self.where

    def split(self, share: float, seed: int, processes: int) -> tuple[tuple[Shard, ...], tuple[Shard, ...]]:
        """Returns the shards to train on and the shards held out.

        About ``share`` of all shards, whole ones, are held out, at least one for each of ``processes``; none if
        ``share`` is 0. ``seed`` alone chooses them. Raises: InputError if there are too few shards.
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
    def names(self) -> LazySequence[str]:
        """The names of all images, by number, when the shards were written. Each one that is asked for reads its
        shard."""
        return LazySequence(self.manifest.images, self._name)

    def _name(self, number: int) -> str:
        shard = next(shard for shard in self.manifest.shards if number < shard.first + shard.images)
        location = ShardStorage(self.where, self.options)
        try:
            return next(image.name for image in read_shard(location, shard) if image.index == number)
        except (InputError, StopIteration):
            return f"image {number} in {location.name(shard.name)}"


def refuse_shards(source: str) -> None:
    """Raises: InputError if ``source`` names shards, see ``is_shard_set``, where files of images are needed."""
    if is_shard_set(source):
        what = "a command" if source.startswith(PIPE) else "a URL" if "://" in source else "shards"
        raise InputError(
            f"{shown(source)}: {what}, which only `train` and `predict --format parquet` take; give files of images, or"
            " their folder"
        )


def is_shard_set(source: str) -> bool:
    """Tells whether ``source`` names shards, as ``ShardSet.from_source`` takes them.

    These are a URL, ``pipe:COMMAND``, and a folder into which `fastmsflow shard` wrote, or its manifest.json; reading
    says so if the folder is not complete.
    """
    if "://" in source or source.startswith(PIPE):
        return True
    path = Path(source)
    folder = path.parent if path.name == MANIFEST else path
    # Names are tried, as a folder of millions of images takes long to list. The first shard is missing if none of its
    # images could be read.
    if any((folder / name).is_file() for name in (FIRST_SHARD, JOURNAL)):
        return True
    if not (folder / MANIFEST).is_file():
        return False
    try:
        # A manifest of another version counts too; reading it says which version it is.
        found = read_json_file(folder / MANIFEST, dict[str, Any], MANIFEST, "")
        return str(found.get("format")).startswith("fastmsflow shards")
    except (OSError, InputError):
        return False
