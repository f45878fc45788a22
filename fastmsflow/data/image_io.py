"""Reads image files, bytes and arrays as pixels. Every fault of a file is an InputError that names the file."""

import errno
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..errors import InputError
from ..files import shown
from ..quiet import QuietThread
from .image_formats import FORMATS

# Phones put a preview behind the photograph.
ONE_IMAGE = frozenset({"MPO"})
ORIENTATION = 0x0112  # in EXIF
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_METADATA = frozenset({b"eXIf", b"tEXt", b"zTXt", b"iTXt"})
# The coarsest grid (stride 16, then the pool) has a pixel for every 32 of the image.
SMALLEST = 32

_QUIET = QuietThread()


def read_image(path: str | Path) -> Image.Image:
    """Reads a file as 8-bit RGB, upright as viewers show it (EXIF orientation applied).

    Gray is repeated, 16 bits are scaled (not clipped), transparency is dropped, CMYK is converted without its color
    profile. Raises: InputError if the file is missing, no image, damaged, too large (over 179 megapixels, by its
    header), under 32 pixels on a side, of several frames or pages, or of floating-point pixels.
    """
    with opened_image(path) as image:
        return _rgb(upright(image), path)


def decode_image(content: bytes, name: str) -> Image.Image:
    """Decodes a file's bytes into the image that ``read_image`` makes of the file. ``name``: the name in errors.

    Raises: InputError if the bytes are no image that ``read_image`` takes.
    """
    with _faults_named(name), _identified(io.BytesIO(content), name) as image:
        return _rgb(upright(image), name)


def check_image(content: bytes, name: str) -> None:
    """Raises: InputError if a file's bytes are, by their header, no image that ``read_image`` takes.

    Pixels are not decoded, so damage behind the header goes unseen.
    """
    with _faults_named(name), _identified(io.BytesIO(content), name):
        pass


def read_bytes(path: str | Path) -> bytes:
    """Reads a file's bytes. Raises: InputError if the file is missing, no file, or cannot be read."""
    with _faults_named(path):
        _check_regular(path)
        return Path(path).read_bytes()


def image_size_of(path: str | Path) -> tuple[int, int]:
    """Returns (width, height) of the upright image, from the file's header if that is enough.

    Raises: InputError if the header tells of no image that ``read_image`` takes.
    """
    with opened_image(path) as image:
        # Pillow decodes the pixels of a PNG to find metadata behind them.
        is_in_header = image.format == "PNG" and not _ends_with_metadata(Path(path))
        exif = Image.Image.getexif(image) if is_in_header else image.getexif()
        # Some decoders turn the size in the header already.
        turned = exif.get(ORIENTATION, 1) != 1
        return upright(image).size if turned else image.size


def _ends_with_metadata(png: Path) -> bool:
    """Returns whether a PNG file has chunks behind its pixels that may tell of an orientation."""
    has_pixels = False
    with png.open("rb") as file:
        file.seek(len(PNG_SIGNATURE))
        while len(heading := file.read(8)) == 8:
            length, kind = int.from_bytes(heading[:4], "big"), heading[4:]
            if has_pixels and kind in PNG_METADATA:
                return True
            has_pixels |= kind == b"IDAT"
            file.seek(length + 4, os.SEEK_CUR)  # with its checksum
    return False


def image_from_array(array: np.ndarray, name: str) -> Image.Image:
    """Converts an array into the image that ``read_image`` makes of such a file.

    ``array``: gray (H, W) or color (H, W, 3 or 4) of uint8, or gray of uint16. ``name``: the name in errors. Raises:
    InputError for another shape or dtype, or under 32 pixels on a side.
    """
    gray, color = array.ndim == 2, array.ndim == 3 and array.shape[-1] in (3, 4)
    if not (array.dtype == np.uint8 and (gray or color)) and not (array.dtype == np.uint16 and gray):
        remedy = "give (H, W) or (H, W, 3) of uint8"
        if array.ndim == 3 and array.shape[0] == 3:
            remedy += ": x.transpose(1, 2, 0)"
        elif np.issubdtype(array.dtype, np.floating):
            remedy += ": (255 * x).astype(np.uint8)"
        raise InputError(f"{name}: {array.dtype} of shape {array.shape}; {remedy}")
    return _rgb(Image.fromarray(array), name)


def image_from_pil(image: Image.Image, name: str) -> Image.Image:
    """Converts an image of Pillow's, which stays as it is, into the one that ``read_image`` makes of such a file.

    ``name``: the name in errors. Raises: InputError for what ``read_image`` refuses.
    """
    with _faults_named(name):
        # It is copied, since it is turned in place.
        return _rgb(upright(image.copy()), name)


def load_image(path: str | Path, image_size: tuple[int, int]) -> Tensor:
    """Reads a file and resizes it to ``image_size`` (H, W) by Lanczos.

    Returns float32 (3, H, W) in [0, 1], not normalized. Raises: InputError if ``read_image`` does not take the file.
    """
    return as_tensor(read_image(path), image_size)


def as_tensor(image: Image.Image, image_size: tuple[int, int]) -> Tensor:
    """Resizes 8-bit RGB to ``image_size`` (H, W) by Lanczos: float32 (3, H, W) in [0, 1]."""
    height, width = image_size
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.divide(np.asarray(image), 255, dtype=np.float32).transpose(2, 0, 1))


def _check_size(image: Image.Image, name: str | Path, smallest: int = SMALLEST) -> None:
    if min(image.size) < smallest:
        raise InputError(
            f"{shown(name)}: {image.width}x{image.height} pixels, less than the extractor's stride of {SMALLEST};"
            " leave it out"
        )


def _rgb(image: Image.Image, name: str | Path) -> Image.Image:
    _check_size(image, name)
    if image.mode.startswith("I"):
        return Image.fromarray(_eight_bits(np.asarray(image), name)).convert("RGB")
    if image.mode == "F":
        check_finite(np.asarray(image), name)
        raise InputError(f"{shown(name)}: floating-point pixels have no agreed range; save it with 8 or 16 bits")
    # Pillow warns of transparency that is dropped.
    with _QUIET:
        return image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """Decodes ``image`` and turns it as its EXIF orientation says."""
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return image


@contextmanager
def opened_image(path: str | Path, smallest: int = SMALLEST) -> Iterator[Image.Image]:
    """Opens a file, whose pixels are not yet decoded, in a with block.

    ``smallest``: the fewest pixels on a side. Raises: InputError that names the file, also for faults of the block.
    """
    with _faults_named(path):
        _check_regular(path)
        # Not by its name: Pillow then maps uncompressed files into memory, and mixes up a turned TIFF's rows.
        with Path(path).open("rb") as file, _identified(file, path, smallest) as image:
            yield image


def _check_regular(path: str | Path) -> None:
    mode = Path(path).stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        # Opening a pipe that nothing writes into would wait for ever.
        raise InputError(f"{shown(path)}: a pipe or a device, not a file; save the image as a file")


@contextmanager
def _identified(file: BinaryIO, name: str | Path, smallest: int = SMALLEST) -> Iterator[Image.Image]:
    """Opens one image that is not yet decoded. Raises: InputError if its header tells of a size that is not taken."""
    with Image.open(file, formats=FORMATS) as image:
        _check_size(image, name, smallest)
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format not in ONE_IMAGE:
            raise InputError(f"{shown(name)}: holds {frames} frames or pages; save each as a file of its own")
        yield image


@contextmanager
def _faults_named(path: str | Path) -> Iterator[None]:
    name = shown(path)
    try:
        # Large photographs are usual here; Pillow's error, at twice the size of its warning, stays. Damaged metadata
        # is not needed.
        with _QUIET:
            yield
    except InputError:
        raise
    except FileNotFoundError as error:
        what = "a link to a file that is not there; mend it or remove it" if Path(path).is_symlink() else "no such file"
        raise InputError(f"{name}: {what}") from error
    except IsADirectoryError as error:
        raise InputError(f"{name}: a folder, not an image; give the images in it") from error
    except PermissionError as error:
        raise InputError(f"{name}: no permission to read it; change its mode or leave it out") from error
    except UnidentifiedImageError as error:
        # An image out of a shard has a name, but is no file.
        empty = Path(path).is_file() and Path(path).stat().st_size == 0
        what = "empty (0 bytes), not an image" if empty else "not an image that can be read"
        raise InputError(f"{name}: {what}; remove it or save it as PNG") from error
    except (Image.DecompressionBombError, MemoryError) as error:
        limit = f" (more than {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels)" if Image.MAX_IMAGE_PIXELS else ""
        raise InputError(f"{name}: too large to decode{limit}; scale it down or cut it into tiles") from error
    except Exception as error:
        # What decoders raise on damaged bytes is of every type: struct.error, KeyError, zlib.error, ...
        if isinstance(error, OSError) and error.errno in (errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR):
            raise InputError(f"{name}: no such file ({error.strerror})") from error
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise InputError(f"{name}: too many files are open; raise `ulimit -n` or take fewer workers") from error
        # Pillow's own errors of damaged files have no number.
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(f"{name}: cannot be read ({error.strerror}); look after its disk, or copy it") from error
        raise InputError(f"{name}: damaged or truncated ({error}); copy it again") from error


def check_finite(values: np.ndarray, name: str | Path) -> None:
    """Raises: InputError if floating-point pixels hold NaN or infinity."""
    bad = int(values.size - np.isfinite(values).sum())
    if bad:
        raise InputError(f"{shown(name)}: {bad} pixels are NaN or infinite; replace them and save it with 8 or 16 bits")


def _eight_bits(values: np.ndarray, path: str | Path) -> np.ndarray:
    """Scales 16-bit gray (also as PIL's 32-bit mode I) to 8 bits: 65535 becomes 255."""
    if values.min() < 0 or values.max() > 65535:
        raise InputError(f"{shown(path)}: pixels from {values.min()} to {values.max()}; save it with 8 or 16 bits")
    # float32 rounds the same and spares a large image gigabytes.
    scaled = np.divide(values, 257, dtype=np.float32)
    return scaled.round(out=scaled).astype(np.uint8)
