"""What an image set holds, as one short text: two runs with the same one saw the same bytes."""

import hashlib
from pathlib import Path

import numpy as np

from .image_set import ImageSet


def fingerprint(images: ImageSet) -> str:
    """16 hexadecimal digits of a SHA-256 over each sample's place in the set, label, image bytes and mask bytes, in
    order; not over where the files lie. A file that cannot be read counts as such: reading it later says why."""
    total = hashlib.sha256()
    for part in (images.train, images.test):
        for sample in part:
            masked = digest(sample.mask) if sample.mask is not None else ""
            line = f"{sample.label}|{sample.kind}|{sample.mask_above}|{digest(sample.image)}|{masked}\n"
            total.update(line.encode(errors="surrogateescape"))
        total.update(b"--\n")
    return total.hexdigest()[:16]


def listing(images: ImageSet) -> str:
    """16 hexadecimal digits of a SHA-256 over each sample's place in the set, label, and the names and sizes of its
    files: for sets too large to be read for it."""
    total = hashlib.sha256()
    for part in (images.train, images.test):
        for sample in part:
            files = [path for path in (sample.image, sample.mask) if path is not None]
            sizes = "|".join(f"{path.name}|{path.stat().st_size if path.exists() else None}" for path in files)
            total.update(f"{sample.label}|{sample.kind}|{sample.mask_above}|{sizes}\n".encode(errors="surrogateescape"))
        total.update(b"--\n")
    return total.hexdigest()[:16]


def digest(image: str | Path | np.ndarray) -> str:
    """SHA-256 of a file's bytes, or of an array's shape, dtype and values, hexadecimal; "unreadable"'s of a file that
    cannot be read."""
    if isinstance(image, np.ndarray):
        return hashlib.sha256(f"{image.shape} {image.dtype}\n".encode() + image.tobytes()).hexdigest()
    try:
        return hashlib.sha256(Path(image).read_bytes()).hexdigest()
    except OSError:
        return hashlib.sha256(b"unreadable").hexdigest()
