"""Reads, checks and writes the manifest, which describes a set of shards."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

from ...errors import InputError, UnavailableError, cut
from ...files import shown, write_json
from ...schema import MOST_BYTES, Within, conform, read_json
from ..fingerprint import short_digest
from .storage import MANIFEST, NO_FILE, ShardStorage

FORMAT = "fastmsflow shards 1"
SHARD_NAME = re.compile(r"[\w-][\w.-]*\.tar")
AGAIN = "copy it again, or write the shards again with `fastmsflow shard`"
# An image is two members of a tar, and each one has a header and content of a block or more.
BLOCK = 512
LEAST_BYTES = 4 * BLOCK
Count = Annotated[int, Within(0)]


class ShardDescription(TypedDict):
    """A Shard in a manifest."""

    name: Annotated[str, Within(1, 255)]
    first: Count
    images: Count
    bytes: Count
    sha256: Annotated[str, Within(64, 64)]


class ManifestDescription(TypedDict):
    """The content of a manifest, beside its format."""

    shards: list[ShardDescription]
    images: Count
    bytes: Count
    fingerprint: str
    images_per_shard: Count
    skipped: list[str]


@dataclass(frozen=True)
class Shard:
    """One tar file."""

    name: str
    first: int
    """The number of the shard's first image in the set; the others follow it."""
    images: int
    bytes: int
    sha256: str
    """The SHA-256 of the file, hexadecimal."""


@dataclass(frozen=True)
class Manifest:
    """The shards of a set, in order."""

    shards: tuple[Shard, ...]
    fingerprint: str
    """Identifies the images' names, in order: 16 hexadecimal digits."""
    images_per_shard: int
    """The most images in a shard."""
    skipped: tuple[str, ...] = ()
    """A line for each image that was left out."""

    @property
    def images(self) -> int:
        """The number of images in the set."""
        return sum(shard.images for shard in self.shards)

    @property
    def bytes(self) -> int:
        """The size of all shards."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def content(self) -> str:
        """Identifies the shards' content, see ``content_of``."""
        return content_of(self.shards)

    def write(self, folder: Path) -> None:
        """Writes ``folder``/manifest.json, aside first, then renamed."""
        totals = {"format": FORMAT, "images": self.images, "bytes": self.bytes}
        write_json(folder / MANIFEST, {**totals, **asdict(self)})

    @classmethod
    def read(cls, where: ShardStorage) -> "Manifest":
        """Reads a set's manifest. Raises: InputError if there is none, it has another format, or it contradicts
        itself."""
        name = where.name(MANIFEST)
        try:
            # A server may send without end.
            text = where.read(MANIFEST, MOST_BYTES)
        except (InputError, UnavailableError):
            raise
        except Exception as error:  # every kind of storage has its own
            why = where.why(error)
            if why == NO_FILE:
                why += (
                    "; give the folder or URL that `fastmsflow shard` wrote, all of it; where writing was not finished,"
                    " the same command again goes on with it"
                )
            elif "; " not in why:
                why += "; give the folder or URL that `fastmsflow shard` wrote, all of it"
            raise InputError(f"{name}: {why}") from error
        if len(text) > MOST_BYTES:
            raise InputError(f"{name}: no manifest of shards (larger than {MOST_BYTES / 2**20:g} MiB); {AGAIN}")
        what = f"{name}: no manifest of shards"
        found = read_json(text, dict[str, Any], what, AGAIN)
        if found.get("format") != FORMAT:
            written = shown(cut(repr(found.get("format"))))
            raise InputError(f"{what} of format {written}; this version reads {FORMAT!r}; {AGAIN}")
        content = conform(found, ManifestDescription, what, AGAIN)
        known = ShardDescription.__annotations__.keys()
        named = ((f"shards[{i}].{key}", key) for i, shard in enumerate(content["shards"]) for key in shard)
        if unknown := next((name for name, key in named if key not in known), None):
            raise InputError(f"{what} ({shown(cut(unknown))} is not known); {AGAIN}")
        shards = tuple(Shard(**shard) for shard in content["shards"])
        skipped = tuple(content["skipped"])
        manifest = cls(shards, content["fingerprint"], content["images_per_shard"], skipped)
        if fault := _contradiction(manifest, content):
            raise InputError(f"{name}: {fault}; {AGAIN}")
        return manifest


def content_of(shards: Sequence[Shard]) -> str:
    """Returns 16 hexadecimal digits of a SHA-256 over the shards' own checksums: a position in shards is valid for one
    such content."""
    return short_digest(shard.sha256.encode() for shard in shards)


def _contradiction(manifest: Manifest, content: ManifestDescription) -> str | None:
    if not manifest.shards:
        return "lists no shards"
    names: set[str] = set()
    by_checksum: dict[str, str] = {}
    first = 0
    largest = max(shard.images for shard in manifest.shards)
    for shard in manifest.shards:
        if not SHARD_NAME.fullmatch(shard.name):
            return f"{shard.name!r} is no name of a shard"
        if shard.images * LEAST_BYTES > shard.bytes:
            return f"{shard.name} has {shard.images} images in {shard.bytes} bytes, which cannot be"
        if shard.name in names:
            return f"lists {shard.name} twice"
        if shard.sha256 in by_checksum:
            return f"{by_checksum[shard.sha256]} and {shard.name} are the same file twice"
        if shard.images < 1 or shard.first != first:
            return f"{shard.name} begins at image {shard.first} and has {shard.images}, expected image {first}"
        names.add(shard.name)
        by_checksum[shard.sha256] = shard.name
        first += shard.images
    if largest > manifest.images_per_shard:
        return f"says that a shard has up to {manifest.images_per_shard} images, and one has {largest}"
    for unit, said, held in (
        ("images", content["images"], manifest.images),
        ("bytes", content["bytes"], manifest.bytes),
    ):
        if said != held:
            return f"says {said} {unit}, its shards hold {held}"
    return None
