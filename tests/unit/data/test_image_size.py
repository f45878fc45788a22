"""Images of a size that is not taken are refused by their headers: none of them is decoded."""

import base64
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from fastmsflow import InputError
from fastmsflow.data import Sample, load_image, load_mask, read_image, write_shards
from fastmsflow.data.image_io import check_image, decode_image, image_size_of
from fastmsflow.data.jpeg_decoder import encoded_or_pixels
from fastmsflow.data.url_images import open_image
from fastmsflow.inference.columns import BatchColumns

SIZES = [(178_000_000, 1), (1, 178_000_000), (5_000_000, 31), (20_000, 20_000)]


def png(width: int, height: int) -> bytes:
    """A PNG of that size by its header, with hardly any pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def bmp(width: int, height: int) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 0, 0, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 2000, 0, 0, 54 + 1024) + header + bytes(1024 + 100)


@pytest.fixture(autouse=True)
def nothing_is_decoded(monkeypatch) -> None:
    def load(self: ImageFile.ImageFile) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)


def row(content: bytes) -> object:
    return BatchColumns.from_batch({"bytes": [content]}).read(0, (64, 64))


READERS: dict[str, Callable[[bytes, Path], object]] = {
    "file": lambda content, path: read_image(path),
    "dataset": lambda content, path: load_image(path, (64, 64)),
    "URL": lambda content, path: open_image(path.as_uri()),
    "member of a shard": lambda content, path: decode_image(content, "a"),
    "shard's writer": lambda content, path: check_image(content, "a"),
    "GPU's decoder": lambda content, path: encoded_or_pixels(content, "a", (64, 64)),
    "batch": lambda content, path: row(content),
    "batch of base64": lambda content, path: row(base64.b64decode(base64.b64encode(content))),
    "image of a mask": lambda content, path: load_mask(Sample(path, 1, path), (64, 64)),
}


@pytest.mark.parametrize("how", READERS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("encode", [png, bmp])
def test_a_size_that_is_not_taken_is_refused_before_decoding(encode, size, how: str, tmp_path: Path) -> None:
    content = encode(*size)
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match=r"less than the extractor's stride of 32|too large to decode"):
        READERS[how](content, tmp_path / "a.png")


def test_a_mask_of_another_size_is_refused_before_decoding(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(64, 48))
    (tmp_path / "mask.png").write_bytes(png(100_000_000, 1))
    with pytest.raises(InputError, match=r"mask\.png: the mask is 100000000x1, its image a\.png 64x48"):
        load_mask(Sample(tmp_path / "a.png", 1, tmp_path / "mask.png"), (8, 8))


def test_shards_leave_them_out_by_the_header(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(178_000_000, 1))
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "b.png")
    manifest = write_shards([tmp_path / "a.png", tmp_path / "b.png"], tmp_path / "shards")
    assert manifest.images == 1
    assert "178000000x1 pixels, less than" in manifest.skipped[0]


def test_the_size_of_a_png_is_told_by_its_header(tmp_path: Path) -> None:
    """Tiles of thousands of images are numbered before one is read."""
    (tmp_path / "a.png").write_bytes(png(70, 40))
    assert image_size_of(tmp_path / "a.png") == (70, 40)
