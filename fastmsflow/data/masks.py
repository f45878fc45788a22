"""Finds the masks of images, and reads them as pixels that are defective or not."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from ..errors import InputError
from ..files import shown
from .image_formats import suffix_of
from .image_io import check_finite, image_size_of, opened_image, upright
from .image_set import Sample, images_in

MASK_NAMES = ("{}_mask", "{}")
"""The names that an image's mask may have, in order; the braces stand for the image's name without suffix."""
_OPAQUE = 255
# Regions touch at corners too, as those of AUPRO do.
_EIGHT_CONNECTED = np.ones((3, 3), dtype=bool)


class Mask(NamedTuple):
    """A mask at the size at which it is compared with score maps."""

    pixels: Tensor
    """bool (H, W), True where the image is defective."""
    marked: int = 0
    """The number of pixels that the file marks."""
    is_full: bool = False
    """True if the file marks every pixel."""
    lost: int = 0
    """The number of regions of the file of which the resized mask has no pixel."""


def load_mask(sample: Sample, image_size: tuple[int, int] | None) -> Tensor:
    """Reads the mask of ``sample``, resized by nearest neighbor: bool (H, W), all False if there is no mask.

    ``image_size``: (H, W); None: the image's own.
    Pixels above ``sample.mask_above`` (16 bits: 257 times that) are defective. In a mask of 0 and one other value, the
    other value is defective, whatever it is. Of a color, the largest channel counts; a palette's colors are defective
    unless they are black. Transparent pixels are not defective; in a mask of one color, the opaque pixels are. Raises:
    InputError if the mask cannot be read, is not of its image's size, holds several values none of which is above, or
    its colors and its transparency contradict each other.
    """
    return read_mask(sample, image_size).pixels


def read_mask(sample: Sample, image_size: tuple[int, int] | None) -> Mask:
    """Reads the mask of ``sample`` as ``load_mask`` does, with what resizing makes of it; the errors are the same."""
    if sample.mask is None and image_size is not None:
        return Mask(torch.zeros(image_size, dtype=torch.bool))
    size = width, height = image_size_of(sample.image)
    image_size = image_size or (height, width)
    if sample.mask is None:
        return Mask(torch.zeros(image_size, dtype=torch.bool))
    defective = np.zeros((height, width), dtype=bool)
    for file in _files(sample):
        # It may have any size here: the comparison has the better message.
        with opened_image(file, smallest=1) as image:
            # The header is compared first, and a turned mask once it is upright.
            mask = upright(image) if sorted(image.size) == sorted(size) else image
            if mask.size != size:
                raise _other_size(sample, file, mask.size, size)
            defective |= _defective(mask, file, sample.mask_above)
    height, width = image_size
    resized = np.array(Image.fromarray(defective).resize((width, height), Image.Resampling.NEAREST))
    marked = int(np.count_nonzero(defective))
    lost = _lost_regions(defective, image_size) if marked and defective.shape != image_size else 0
    return Mask(torch.from_numpy(resized), marked, marked == defective.size, lost)


def check_mask_size(sample: Sample) -> None:
    """Raises: InputError if, by their headers, the mask of ``sample`` has not the size of its image.

    A mask whose width is its image's height may be turned, which is known once it is read.
    """
    if sample.mask is None:
        return
    size = image_size_of(sample.image)
    for file in _files(sample):
        with opened_image(file, smallest=1) as mask:
            if sorted(mask.size) != sorted(size):
                raise _other_size(sample, file, mask.size, size)


def _files(sample: Sample) -> list[Path]:
    """Returns the files of a sample's mask. Raises: InputError if it is a folder that holds none."""
    files = sample.mask_files
    if not files and sample.mask is not None:
        raise InputError(f"{shown(sample.mask)}: holds no masks; put one of each defect into it, e.g. 000.png")
    return files


def _other_size(sample: Sample, file: Path, mask: tuple[int, int], image: tuple[int, int]) -> InputError:
    """Returns the error of a mask whose (width, height) is not that of its image."""
    return InputError(
        f"{shown(file)}: the mask is {mask[0]}x{mask[1]}, its image {shown(sample.image.name)}"
        f" {image[0]}x{image[1]}; give a mask of the image's size"
    )


class MaskFolder:
    """The masks in a folder, by name; suffixes of every format that is read count, and upper and lower case do not.

    ``names``: see MASK_NAMES.
    """

    def __init__(self, folder: Path, names: Sequence[str] = MASK_NAMES) -> None:
        self.folder = folder
        self.names = names
        self._by_stem: dict[str, list[Path]] = {}
        for path in images_in(folder) if folder.is_dir() else ():
            self._by_stem.setdefault(path.stem.casefold(), []).append(path)

    def mask_of(self, image: Path) -> Path:
        """Returns the mask of ``image``, with any suffix. Raises: InputError if there is none."""
        for stem in (name.format(image.stem) for name in self.names):
            found = self._by_stem.get(stem.casefold(), [])
            if found:
                # Exactly this name first, then PNG, then the image's own format.
                return min(
                    found,
                    key=lambda path: (
                        path.stem != stem,
                        suffix_of(path.name) != ".png",
                        suffix_of(path.name) != suffix_of(image.name),
                    ),
                )
        wanted = f"{self.names[0].format(image.stem)}.png"
        raise InputError(f"{shown(image)}: has no mask; put {shown(wanted)} into {shown(self.folder)}")


class DefectMaskFolder:
    """The masks below a folder, of which each image has a folder of its own, with a mask of each defect in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def mask_of(self, image: Path) -> Path:
        """Returns the folder of the masks of ``image``, STEM. Raises: InputError if it is not there or holds none."""
        masks = self.folder / image.stem
        if not masks.is_dir() or not images_in(masks):
            raise InputError(
                f"{shown(image)}: has no mask; put one of each defect into {shown(masks)}, as 000.png, 001.png"
            )
        return masks


def _defective(mask: Image.Image, file: Path, above: int) -> np.ndarray:
    """Returns bool (H, W): the pixels of the mask in ``file`` that are defective, see Sample.mask_above."""
    values = _values(mask, file)
    check_finite(values, file)
    largest = values.max()
    above *= 257 if largest > 255 else 1
    if 0 < largest <= above:
        if not np.isin(values, (0, largest)).all():
            raise InputError(
                f"{shown(file)}: the mask's values go up to {largest:g}, and defective is what is above {above};"
                " save it with 255 where the defect is and 0 elsewhere"
            )
        above = 0
    return values > above


def _values(mask: Image.Image, name: Path) -> np.ndarray:
    """Returns one value of each pixel, (H, W)."""
    if mask.mode.startswith("I") or mask.mode in ("L", "F"):
        return np.asarray(mask)
    # Elsewhere a color stands for transparency, and the colors tell the pixels apart.
    if mask.mode in ("RGBA", "RGBa", "LA", "La", "PA") or (mask.mode == "P" and "transparency" in mask.info):
        return _visible(np.asarray(mask.convert("RGBA")), name)
    colors = np.asarray(mask.convert("RGB"))
    largest = colors.max(axis=2)
    is_colored = mask.mode == "P" and bool((colors.min(axis=2) != largest).any())
    return (largest > 0).astype(np.uint8) if is_colored else largest


def _visible(pixels: np.ndarray, name: Path) -> np.ndarray:
    """Returns (H, W) uint8 of RGBA pixels: their values before black, or their opacity if they have one color."""
    largest, opacity = pixels[..., :3].max(axis=2), pixels[..., 3]
    has_one_color, is_even = bool((pixels[..., :3] == pixels[0, 0, :3]).all()), opacity.min() == opacity.max()
    if has_one_color and (not is_even or opacity.max() == 0):
        return opacity
    if is_even:
        return largest
    before_black = (largest.astype(np.uint16) * opacity // _OPAQUE).astype(np.uint8)
    if not before_black.any():
        raise InputError(
            f"{shown(name)}: the mask's opaque pixels are black and its transparent ones are not, so that either may"
            " be the defect; save it without transparency, with 255 where the defect is and 0 elsewhere"
        )
    return before_black


def _lost_regions(defective: np.ndarray, image_size: tuple[int, int]) -> int:
    """Returns the number of regions, the 8-connected components, that resizing by nearest neighbor leaves out."""
    rows, columns = np.flatnonzero(defective.any(axis=1)), np.flatnonzero(defective.any(axis=0))
    # Defects are small, and labeling is slow.
    top, left = rows[0], columns[0]
    labels, count = ndimage.label(defective[top : rows[-1] + 1, left : columns[-1] + 1], _EIGHT_CONNECTED)
    taken = [_taken(size, new) for size, new in zip(defective.shape, image_size, strict=True)]
    inside = [
        index[(index >= first) & (index < first + length)] - first
        for index, first, length in zip(taken, (top, left), labels.shape, strict=True)
    ]
    return count - np.count_nonzero(np.unique(labels[np.ix_(*inside)]))


def _taken(size: int, new: int) -> np.ndarray:
    """Returns the numbers of the ``new`` of ``size`` rows that Pillow takes in resizing by nearest neighbor."""
    numbers = Image.fromarray(np.arange(size, dtype=np.int32)[None])
    return np.asarray(numbers.resize((new, 1), Image.Resampling.NEAREST))[0]
