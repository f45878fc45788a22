"""Views of images: an image or a tile of it, under the light that it was taken in or another one."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..tiling import Place, Size, Tiling, cut_tile
from .image_io import as_tensor, image_from_array, image_size_of, read_image
from .light import LightChange

GivenImage = str | Path | np.ndarray
"""An image file, or an array: gray (H, W) or color (H, W, 3 or 4) of uint8, or gray of uint16."""


@dataclass(frozen=True, eq=False)
class ImageView:
    """Describes the part of an image, and its light, that a model is shown."""

    image: GivenImage
    tiling: Tiling | None = None
    """The way in which the image is cut; None: the whole image is resized."""
    place: Place | None = None
    """The place of the tile that is shown, if the image is cut."""
    light: LightChange | None = None
    """The change of light, None for none."""

    @property
    def identity(self) -> str:
        """A text that two views of an image share only if they have the same pixels."""
        if self.tiling is None:
            return f"{self.light}"
        return f"tile {self.tiling.tile} at {self.place} of {float(self.tiling.scale)} times {self.light}"


def read_view(view: ImageView, name: str, image_size: tuple[int, int]) -> Tensor:
    """Reads a view as float32 (3, H, W) in [0, 1]: a tile, or the image resized to ``image_size``.

    Raises: InputError, which names the image ``name``, if it cannot be read.
    """
    if view.tiling is None or view.place is None:
        pixels = as_tensor(_opened(view.image, name), image_size)
        return pixels if view.light is None else view.light(pixels)
    image = _scaled(view.image, name, view.tiling) if isinstance(view.image, np.ndarray) else _last(view, name)
    pixels = as_floats(cut_tile(image, view.place, view.tiling.tile))
    if view.light is None:
        return pixels
    return view.light(pixels, corner=view.place, size=(image.shape[1], image.shape[2]))


def read_scaled(image: "GivenImage | ImageView", name: str, tiling: Tiling) -> "ScaledImage":
    """Reads a whole image, ready to be cut; of a view its light counts.

    Raises: InputError, which names the image ``name``, if it cannot be read or scaled.
    """
    view = image if isinstance(image, ImageView) else ImageView(image)
    scaled = scaled_pixels(_opened(view.image, name), tiling, name)
    if view.light is None:
        return scaled
    return scaled._replace(pixels=(view.light(as_floats(scaled.pixels)) * 255).round().byte())


class ScaledImage(NamedTuple):
    """An image at a tiling's scale, ready to be cut."""

    pixels: Tensor
    """(3, H, W) uint8, or floating in [0, 1]."""
    size: Size
    """(height, width) of the image before it was scaled."""
    name: str


def scaled_pixels(image: Image.Image, tiling: Tiling, name: str) -> ScaledImage:
    """Scales 8-bit RGB by Lanczos. ``name``: the image's name, in errors too.

    Raises: InputError if the scale leaves too few or too many pixels.
    """
    size = (image.height, image.width)
    height, width = tiling.scaled_size(size, name)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return ScaledImage(torch.from_numpy(np.array(image)).permute(2, 0, 1), size, name)


def scaled_image(image: Tensor, tiling: Tiling, name: str) -> ScaledImage:
    """Scales an image (3, H, W), uint8 as ``scaled_pixels`` does, floating by an antialiased bicubic filter.

    Raises: InputError if the scale leaves too few or too many pixels.
    """
    size = (image.shape[1], image.shape[2])
    scaled = tiling.scaled_size(size, name)
    if scaled == size:
        return ScaledImage(image, size, name)
    if image.dtype == torch.uint8:
        return scaled_pixels(Image.fromarray(image.permute(1, 2, 0).cpu().numpy()), tiling, name)
    pixels = F.interpolate(image[None], size=scaled, mode="bicubic", antialias=True, align_corners=False)[0]
    return ScaledImage(pixels.clamp(0, 1), size, name)


def as_floats(pixels: Tensor) -> Tensor:
    """Returns 8-bit pixels as float32 in [0, 1] on the CPU, contiguous, as ``as_tensor`` does."""
    return torch.from_numpy(np.divide(pixels.contiguous().cpu().numpy(), 255, dtype=np.float32))


def size_of(image: GivenImage) -> Size:
    """Returns (height, width) of an image, of a file by its header. Raises: InputError if that cannot be read."""
    if isinstance(image, np.ndarray):
        return image.shape[0], image.shape[1]
    width, height = image_size_of(image)
    return height, width


def name_of(image: GivenImage, number: int) -> str:
    """Returns an image's name for errors: its file, or its number if it is an array."""
    return f"image {number}" if isinstance(image, np.ndarray) else str(image)


def _opened(image: GivenImage, name: str) -> Image.Image:
    return image_from_array(image, name) if isinstance(image, np.ndarray) else read_image(image)


def _scaled(image: GivenImage, name: str, tiling: Tiling) -> Tensor:
    return scaled_pixels(_opened(image, name), tiling, name).pixels


def _last(view: ImageView, name: str) -> Tensor:
    """Returns a file's scaled pixels. Tiles of an image come one after the other, so the last image is held."""
    assert view.tiling is not None and not isinstance(view.image, np.ndarray)
    path = Path(view.image)
    stamp = path.stat().st_mtime_ns if path.exists() else None
    return _read_last(path, name, view.tiling, stamp)


@lru_cache(1)
def _read_last(path: Path, name: str, tiling: Tiling, stamp: int | None) -> Tensor:
    """Reads a file; ``stamp``: another one if the file has changed."""
    return _scaled(path, name, tiling)
