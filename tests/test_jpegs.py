"""Encoded JPEG files become, many at once, the pixels that Pillow makes of them; others go Pillow's way."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as photographs
from tolerances import JPEG_DECODERS

from fastmsflow import InputError
from fastmsflow.data import LooseImages
from fastmsflow.data.images import as_tensor, decode_image
from fastmsflow.data.jpegs import decoded, decoded_or_not, is_plain_jpeg

CPU = torch.device("cpu")


def jpeg(pixels: np.ndarray, mode: str = "RGB", **options) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(content, "JPEG", quality=95, **options)
    return content.getvalue()


PHOTOGRAPH = photographs.astronaut()[:300, 100:420]
PLAIN = jpeg(PHOTOGRAPH)


def test_jpeg_files_decode_as_by_pillow() -> None:
    """At their own size, where no filter differs; one of another size among them, and a grey one."""
    files = [PLAIN, jpeg(photographs.camera()[:300, :320], "L"), jpeg(photographs.astronaut()[:200, :200])]
    pixels = decoded([decoded_or_not(file, "a", (300, 320)) for file in files], (300, 320), CPU)
    assert pixels.shape == (3, 3, 300, 320)
    for image, file in zip(pixels[:2], files[:2], strict=True):
        off = (image - as_tensor(decode_image(file, "a"), (300, 320))).abs()
        assert off.max() <= JPEG_DECODERS["decoded"]


def test_a_smaller_image_differs_from_lanczos_by_little() -> None:
    pixels = decoded([decoded_or_not(PLAIN, "a", (96, 96))], (96, 96), CPU)[0]
    off = (pixels - as_tensor(decode_image(PLAIN, "a"), (96, 96))).abs()
    assert off.mean() <= JPEG_DECODERS["mean of resized"]
    assert pixels.min() >= 0 and pixels.max() <= 1


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(PHOTOGRAPH, exif=exif)


def png() -> bytes:
    content = io.BytesIO()
    Image.fromarray(PHOTOGRAPH).save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize(
    "content", [turned(), png(), jpeg(PHOTOGRAPH, "CMYK")], ids=["to be turned", "PNG", "four colours"]
)
def test_what_decoders_differ_in_is_left_to_pillow(content: bytes) -> None:
    assert not is_plain_jpeg(content)
    given = decoded_or_not(content, "a", (64, 64))
    assert torch.equal(given, as_tensor(decode_image(content, "a"), (64, 64)))
    assert torch.equal(decoded([given], (64, 64), CPU)[0], given)


@pytest.mark.parametrize("content", [PLAIN[: len(PLAIN) // 2], b"", PLAIN[:10]], ids=["cut off", "empty", "a header"])
def test_a_damaged_file_is_named_before_it_reaches_the_decoder(content: bytes) -> None:
    with pytest.raises(InputError, match=r"^bad\.jpg: "):
        decoded_or_not(content, "bad.jpg", (64, 64))


def test_damage_that_only_the_decoder_sees_is_an_error() -> None:
    broken = bytearray(PLAIN)
    # Its tables of codes.
    at = PLAIN.index(b"\xff\xc4")
    broken[at + 4 : at + 24] = b"\xff" * 20
    with pytest.raises(InputError, match="one of 2 JPEG files cannot be decoded"):
        decoded([decoded_or_not(PLAIN, "a", (64, 64)), decoded_or_not(bytes(broken), "b", (64, 64))], (64, 64), CPU)


def test_files_are_handed_on_encoded(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(PLAIN)
    item = LooseImages([tmp_path / "a.jpg"], (64, 64), encoded=True)[0]["image"]
    assert item.dtype == torch.uint8 and bytes(item.numpy()) == PLAIN
