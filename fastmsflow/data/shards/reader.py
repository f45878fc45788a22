"""Reads a shard from its first byte to its last, and compares it with its manifest."""

import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, BinaryIO, TypedDict

from ...errors import InputError, UnavailableError, cut
from ...files import shown
from ...schema import Within, read_json
from ..fingerprint import HashedFile
from .manifest import AGAIN, BLOCK, Shard
from .storage import CHUNK, ShardStorage


class _ImageDescription(TypedDict):
    """The content of an image's .json."""

    name: Annotated[str, Within(1, 2**16)]
    index: int


@dataclass(frozen=True)
class Encoded:
    """An image as the bytes of its file."""

    content: bytes
    index: int
    name: str
    source: str
    """The shard's and the image's name, for errors."""


def read_shard(location: ShardStorage, shard: Shard, verify: bool = False) -> Iterator[Encoded]:
    """Yields the images of ``shard`` in order, one in memory at a time. ``verify``: none before the checksum was right.

    Raises: InputError that names the shard if it is missing, damaged, cut off, or not the one that the manifest
    describes, to the bit; without ``verify`` possibly after some of its images, for a wrong checksum after all of them.
    """
    name = location.name(shard.name)
    count = 0
    try:
        with location.open(shard.name) as opened, _checked(opened, shard, name, verify) as file:
            counted = HashedFile(file)
            members = _members(counted, shard.bytes, name)
            # The members of an image stand together.
            for first, second in zip(members, members, strict=False):
                encoded = _encoded(dict((first, second)), name)
                if count == shard.images or encoded.index != shard.first + count:
                    due = f"{shard.first + count} is expected" if count < shard.images else f"{shard.images} are all"
                    raise _fault(name, f"holds image {encoded.index} where {due}, it is another's")
                yield encoded
                count += 1
            while counted.bytes <= shard.bytes and counted.read(CHUNK):
                pass
    except (InputError, UnavailableError):
        raise
    except Exception as error:  # every kind of storage has its own, and so has tar
        raise _fault(name, f"{location.why(error)} after {count} of {shard.images} images") from error
    if count < shard.images or counted.bytes != shard.bytes:
        size = f"{counted.bytes} of {shard.bytes} bytes" if counted.bytes <= shard.bytes else "and goes on"
        raise _fault(name, f"ends after {count} of {shard.images} images, {size}: cut off or damaged")
    if counted.sha256 != shard.sha256:
        raise _fault(name, f"its checksum is not the manifest's, though its {count} images could be read")


def _members(file: HashedFile, limit: int, name: str) -> Iterator[tuple[str, bytes]]:
    """Yields names and contents of the members of a tar of at most ``limit`` bytes.

    The tarfile module would follow what a stranger's file says of itself: holes of any size in sparse members, headers
    of any length, compression, links. The writer writes none of these.
    Raises: InputError for a member that is no plain file or larger than the shard; tarfile.TarError for no tar.
    """
    while True:
        block = file.read(BLOCK)
        if not block.strip(b"\0"):
            return
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or not 0 <= member.size <= limit - file.bytes:
            raise _fault(name, f"{shown(cut(member.name))} is no plain file within the shard's {limit} bytes")
        content = file.read(member.size)
        file.read(-member.size % BLOCK)
        if len(content) < member.size:
            raise tarfile.ReadError("unexpected end of data")
        yield member.name, content


def _encoded(members: dict[str, bytes], name: str) -> Encoded:
    """Returns the image. Raises: InputError if the members are not an image and a .json with its number."""
    key = min(members).rpartition(".")[0]
    fault = f"{shown(cut(key))} is not an image beside its .json"
    json_name = f"{key}.json"
    contents = [content for other, content in members.items() if other.startswith(f"{key}.") and other != json_name]
    if json_name not in members or len(contents) != 1:
        raise _fault(name, fault)
    described = read_json(members[json_name], _ImageDescription, f"{name}: {fault}", AGAIN)
    shown_name = shown(cut(described["name"]))
    return Encoded(contents[0], described["index"], described["name"], f"{name}: {shown_name}")


def _fault(name: str, what: str) -> InputError:
    return InputError(f"{name}: {what}; {AGAIN}")


@contextmanager
def _checked(opened: BinaryIO, shard: Shard, name: str, verify: bool) -> Iterator[BinaryIO]:
    if not verify:
        yield opened
        return
    # A copy, as a second reading from far away may differ.
    with tempfile.TemporaryFile() as copy:
        hashed = HashedFile(opened)
        # It is read up to its size alone: a server may send without end.
        while hashed.bytes <= shard.bytes and (chunk := hashed.read(CHUNK)):
            copy.write(chunk)
        if hashed.sha256 != shard.sha256:
            raise _fault(name, f"its checksum is not the manifest's ({hashed.bytes} of {shard.bytes} bytes)")
        copy.seek(0)
        yield copy
