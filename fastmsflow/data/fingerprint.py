"""What an image set holds, as one short text: two runs with the same one saw the same bytes."""

import hashlib
from pathlib import Path

from .image_set import ImageSet


def fingerprint(images: ImageSet) -> str:
    """16 hexadecimal digits of a SHA-256 over each sample's place in the set, label, image bytes and mask bytes, in
    order; not over where the files lie. A file that cannot be read counts as such: reading it later says why."""
    total = hashlib.sha256()
    for part in (images.train, images.test):
        for sample in part:
            masked = _digest(sample.mask) if sample.mask is not None else ""
            line = f"{sample.label}|{sample.kind}|{sample.mask_above}|{_digest(sample.image)}|{masked}\n"
            total.update(line.encode(errors="surrogateescape"))
        total.update(b"--\n")
    return total.hexdigest()[:16]


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return "unreadable"
