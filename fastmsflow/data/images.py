"""Image files -> pixels. Every fault of a file is an InputError that names it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..errors import InputError
from .image_set import Sample

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
# The coarsest grid (stride 16, then the pool) has a pixel for every 32 of the image.
SMALLEST = 32


def read_image(path: str | Path) -> Image.Image:
    """The file as 8-bit RGB: grey is repeated, 16 bits are scaled (not clipped), transparency is dropped.

    Errors: InputError where the file is missing, no image, damaged, too large or under 32 pixels on a side.
    """
    return _rgb(_open(path), path)


def image_of(array: np.ndarray, name: str) -> Image.Image:
    """Grey (H, W) or colour (H, W, 3 or 4) of uint8, or grey of uint16, as ``read_image`` has it.

    ``name``: what errors call it. Errors: InputError on another shape or dtype, and under 32 pixels on a side.
    """
    grey, colour = array.ndim == 2, array.ndim == 3 and array.shape[-1] in (3, 4)
    if not (array.dtype == np.uint8 and (grey or colour)) and not (array.dtype == np.uint16 and grey):
        raise InputError(
            f"{name}: {array.dtype} of shape {array.shape};"
            " give (H, W) or (H, W, 3) of uint8: (255 * x).astype(np.uint8)"
        )
    return _rgb(Image.fromarray(array), name)


def load_image(path: str | Path, image_size: tuple[int, int]) -> Tensor:
    """The file resized to ``image_size`` (H, W) by Lanczos: float32 (3, H, W) in [0, 1], not normalised.

    Errors: as ``read_image``'s.
    """
    return as_tensor(read_image(path), image_size)


def as_tensor(image: Image.Image, image_size: tuple[int, int]) -> Tensor:
    """8-bit RGB resized to ``image_size`` (H, W) by Lanczos: float32 (3, H, W) in [0, 1]."""
    height, width = image_size
    pixels = np.array(image.resize((width, height), Image.Resampling.LANCZOS), dtype=np.float32)
    return rearrange(torch.from_numpy(pixels), "h w c -> c h w").div_(255)


def load_mask(sample: Sample, image_size: tuple[int, int]) -> Tensor:
    """Where ``sample`` is defective, resized by nearest neighbour: bool (H, W); all False without a mask.

    Errors: InputError where the mask cannot be read or is not of its image's size.
    """
    if sample.mask is None:
        return torch.zeros(image_size, dtype=torch.bool)
    mask = _open(sample.mask)
    size = _size(sample.image)
    if mask.size != size:
        raise InputError(
            f"{sample.mask}: the mask is {mask.width}x{mask.height}, its image {sample.image.name} {size[0]}x{size[1]};"
            " give a mask of the image's size"
        )
    values = np.asarray(mask if mask.mode in ("L", "I;16", "I") else mask.convert("L"))
    height, width = image_size
    resized = Image.fromarray(values > sample.mask_above).resize((width, height), Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(resized))


def list_images(folder: str | Path) -> list[Path]:
    """All image files below ``folder``, sorted, hidden ones left out. Errors: InputError where there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    files = [p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()]
    files = sorted(p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    if not files:
        raise InputError(f"{folder}: holds no images ({', '.join(sorted(SUFFIXES))})")
    return files


def _rgb(image: Image.Image, name: str | Path) -> Image.Image:
    if min(image.size) < SMALLEST:
        raise InputError(
            f"{name}: {image.width}x{image.height} pixels, less than the extractor's stride of {SMALLEST}; leave it out"
        )
    if image.mode.startswith("I"):
        return Image.fromarray(_eight_bits(np.asarray(image), name)).convert("RGB")
    if image.mode == "F":
        raise InputError(f"{name}: floating-point pixels have no agreed range; save it with 8 or 16 bits")
    return image.convert("RGB")


def _open(path: str | Path) -> Image.Image:
    with _faults_named(path), Image.open(path) as image:
        image.load()
        return image


def _size(path: Path) -> tuple[int, int]:
    """(width, height) from the file's header."""
    with _faults_named(path), Image.open(path) as image:
        return image.size


@contextmanager
def _faults_named(path: str | Path) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            # Large photographs are usual here; Pillow's error, at twice the size of its warning, stays.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: a folder, not an image") from error
    except PermissionError as error:
        raise InputError(f"{path}: no permission to read it; change its mode or leave it out") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: not an image that can be read; remove it or save it as PNG") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: too large to decode; cut it into tiles") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise InputError(f"{path}: damaged or truncated ({error}); copy it again") from error


def _eight_bits(values: np.ndarray, path: str | Path) -> np.ndarray:
    """16-bit grey (also as PIL's 32-bit mode I) -> 8 bits: 65535 becomes 255."""
    if values.min() < 0 or values.max() > 65535:
        raise InputError(f"{path}: pixels from {values.min()} to {values.max()}; save it with 8 or 16 bits")
    # float32 rounds the same and spares a large image gigabytes.
    scaled = np.divide(values, 257, dtype=np.float32)
    return scaled.round(out=scaled).astype(np.uint8)
