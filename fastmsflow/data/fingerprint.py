"""Fingerprints of image sets, images, tensors and files: SHA-256, in full or shortened to 16 hexadecimal digits."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .image_io import read_bytes
from .image_set import ImageSet, Sample
from .image_views import GivenImage, ImageView

SHORT = 16


def digest(chunks: Iterable[bytes | memoryview]) -> str:
    """Returns the SHA-256 over ``chunks``, joined, as 64 hexadecimal digits."""
    total = hashlib.sha256()
    for chunk in chunks:
        total.update(chunk)
    return total.hexdigest()


def short_digest(chunks: Iterable[bytes | memoryview]) -> str:
    """Returns the first 16 digits of ``digest``."""
    return digest(chunks)[:SHORT]


def fingerprint(images: ImageSet) -> str:
    """Returns a short text that two image sets share only if they hold the same bytes.

    16 hexadecimal digits of a SHA-256 over each sample's kind, label, image bytes and mask bytes, in order; where the
    files lie does not count. A file that cannot be read counts as such: reading it later says why.
    """

    def describe(sample: Sample) -> str:
        return f"{image_digest(sample.image)}|{'|'.join(map(image_digest, sample.mask_files))}"

    return _image_set_digest(images, describe)


def names_fingerprint(images: ImageSet) -> str:
    """Returns what ``fingerprint`` does, from names and sizes of files in place of bytes: for sets too large to be read
    for it."""
    return _image_set_digest(images, _names_and_sizes)


def image_digest(image: GivenImage | ImageView) -> str:
    """Returns the SHA-256 of a file's bytes, or of an array's shape, dtype and values, as 64 hexadecimal digits.

    A view has one that is made of its image's and of what it shows. A file that cannot be read has the digest of the
    text "unreadable".
    """
    if isinstance(image, ImageView):
        return hashlib.sha256(f"{_digest_of_last(image.image)} {image.identity}".encode()).hexdigest()
    if isinstance(image, np.ndarray):
        return hashlib.sha256(f"{image.shape} {image.dtype}\n".encode() + image.tobytes()).hexdigest()
    try:
        content = read_bytes(image)
    except InputError:
        content = b"unreadable"
    return hashlib.sha256(content).hexdigest()


@lru_cache(1)
def _digest_of_file(path: Path, stamp: tuple[int, int] | None) -> str:
    return image_digest(path)


def _digest_of_last(image: GivenImage) -> str:
    """Returns the digest of an image, of which views often come one after the other."""
    if isinstance(image, np.ndarray):
        return image_digest(image)
    path = Path(image)
    stat = path.stat() if path.is_file() else None
    return _digest_of_file(path, stat and (stat.st_mtime_ns, stat.st_size))


def tensor_chunks(tensors: Mapping[str, Tensor], heading: str) -> Iterator[bytes | memoryview]:
    """Yields what ``short_digest`` hashes of named tensors: each one's heading and values.

    ``heading``: a format string with the fields ``name``, ``shape`` and ``dtype``.
    """
    for name, tensor in tensors.items():
        yield heading.format(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype).encode()
        yield tensor.detach().cpu().flatten().view(torch.uint8).numpy().data


class HashedFile:
    """A binary file that counts and hashes the bytes which are read from it or written into it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self.bytes = 0

    @property
    def sha256(self) -> str:
        """The SHA-256 of the bytes so far, as 64 hexadecimal digits."""
        return self._sha256.hexdigest()

    def read(self, size: int = -1) -> bytes:
        """Reads as the file does."""
        data = self._file.read(size)
        self._count(data)
        return data

    def write(self, data: bytes) -> int:
        """Writes as the file does."""
        self._count(data)
        return self._file.write(data)

    def _count(self, data: bytes) -> None:
        self.bytes += len(data)
        self._sha256.update(data)

    def __str__(self) -> str:
        """WebDataset puts this into its errors."""
        return f"byte {self.bytes}"


def _image_set_digest(images: ImageSet, describe: Callable[[Sample], str]) -> str:
    def chunks() -> Iterator[bytes]:
        # Sets without validation images keep the digest that they had before there were any.
        own = (images.validation,) if images.validation else ()
        for samples in (images.train, images.test, *own):
            for sample in samples:
                line = f"{sample.label}|{sample.kind}|{sample.mask_above}|{describe(sample)}\n"
                yield line.encode(errors="surrogateescape")
            yield b"--\n"

    return short_digest(chunks())


def _names_and_sizes(sample: Sample) -> str:
    files = [sample.image, *sample.mask_files]
    return "|".join(f"{path.name}|{path.stat().st_size if path.exists() else None}" for path in files)
