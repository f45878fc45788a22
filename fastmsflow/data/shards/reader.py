"""Reads a shard from its first byte to its last, and compares it with its manifest."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from ...errors import InputError, UnavailableError
from ...files import shown
from ..fingerprint import HashedFile
from .manifest import AGAIN, Shard
from .storage import ShardStorage

CHUNK = 2**20


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
    from webdataset.tariterators import group_by_keys, tar_file_expander

    name = location.name(shard.name)
    count = 0
    try:
        with location.open(shard.name) as opened, _checked(opened, shard, name, verify) as file:
            counted = HashedFile(file)
            for sample in group_by_keys(tar_file_expander([{"url": name, "stream": counted}])):
                encoded = _encoded(sample, name)
                if count == shard.images or encoded.index != shard.first + count:
                    due = f"{shard.first + count} is expected" if count < shard.images else f"{shard.images} are all"
                    raise _fault(name, f"holds image {encoded.index} where {due}, it is another's")
                yield encoded
                count += 1
            while counted.read(CHUNK):
                pass
    except (InputError, UnavailableError):
        raise
    except Exception as error:  # every kind of storage has its own, and so has tar
        raise _fault(name, f"{location.why(error)} after {count} of {shard.images} images") from error
    if count < shard.images or counted.bytes != shard.bytes:
        raise _fault(
            name,
            f"ends after {count} of {shard.images} images, {counted.bytes} of {shard.bytes} bytes: cut off or damaged",
        )
    if counted.sha256 != shard.sha256:
        raise _fault(name, f"its checksum is not the manifest's, though its {count} images could be read")


def _encoded(sample: dict[str, Any], name: str) -> Encoded:
    """Returns the image. Raises: InputError if the sample is not an image and a .json with its number."""
    content = [value for key, value in sample.items() if not key.startswith("__") and key != "json"]
    try:
        described = json.loads(sample["json"])
        (image,) = content
        return Encoded(image, int(described["index"]), str(described["name"]), f"{name}: {shown(described['name'])}")
    except (KeyError, ValueError, TypeError) as error:
        raise _fault(name, f"{sample['__key__']} is not an image beside its .json") from error


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
        shutil.copyfileobj(hashed, copy, CHUNK)
        if hashed.sha256 != shard.sha256:
            raise _fault(name, f"its checksum is not the manifest's ({hashed.bytes} of {shard.bytes} bytes)")
        copy.seek(0)
        yield copy
