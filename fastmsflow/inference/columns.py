"""Reads images from the columns of a batch, and turns results into columns."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.image_io import SMALLEST, as_tensor, decode_image, image_from_array
from ..data.image_views import ScaledImage, scaled_image, scaled_pixels
from ..data.url_images import open_image
from ..errors import InputError
from ..files import shown
from ..tiling import Tiling
from .scorer import ImageResult

BYTES, IMAGE, PATH, FAULT = "bytes", "image", "path", "fault"
SCORES = ("score", "log_score", "absolute_score")
BOX = ("largest_region_left", "largest_region_top", "largest_region_right", "largest_region_bottom")
NUMBERS = (*SCORES, "largest_region", *BOX)
MAP = "score_map"
Columns: TypeAlias = dict[str, Any]
"""Column name -> its values: a NumPy array of any shape with the rows first, or a list."""


class BatchColumns(NamedTuple):
    """The images of a batch."""

    kind: str
    """The column that holds the images: the first that exists of bytes, image and path."""
    values: Sequence[Any]
    paths: Sequence[Any]
    faults: Sequence[Any]
    """The text of each row that says why it is not scored, or None."""

    @classmethod
    def from_batch(cls, columns: Mapping[Any, Any]) -> "BatchColumns":
        """Finds the images. Raises: InputError if no column holds images, or columns differ in length."""
        kind = next((name for name in (BYTES, IMAGE, PATH) if name in columns), None)
        if kind is None:
            raise InputError(
                f"the batch has columns {', '.join(map(str, columns)) or '(none)'}; one of {BYTES}, {IMAGE} and {PATH}"
                " must hold the images: rename it"
            )
        lengths = {name: _length(name, values) for name, values in columns.items()}
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise InputError(f"the batch's columns differ in their number of rows ({listed}); give each row a value")
        empty = [None] * lengths[kind]
        found = [columns.get(name, empty) for name in (kind, PATH, FAULT)]
        # A pandas.Series would look rows up by its index.
        return cls(kind, *(column if isinstance(column, Sequence) else list(column) for column in found))

    def name(self, row: int) -> str:
        """Returns the name of a row in messages: its path if there is one."""
        try:
            path = self.paths[row]
            return shown(path) if isinstance(path, (str, Path)) and path else f"row {row}"
        except Exception:  # text that is no UTF-8, in whatever column it comes
            return f"row {row}"

    def fault(self, row: int) -> str | None:
        """Returns the text that says why a row is not scored; None if there is none or it is empty."""
        fault = self.faults[row]
        return (isinstance(fault, str) and " ".join(fault.split())) or None

    def read(self, row: int, image_size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Decodes the image of a row.

        Returns: the image, float32 (3, H, W) in [0, 1] at ``image_size``, and its own (width, height).
        Raises: InputError, which names the row, if there is no image or it cannot be decoded.
        """
        image = self._opened(row)
        if isinstance(image, np.ndarray):
            return _resized(image, image_size), (image.shape[1], image.shape[0])
        return as_tensor(image, image_size), image.size

    def read_to_cut(self, row: int, tiling: Tiling) -> ScaledImage:
        """Decodes the image of a row, ready to be cut into tiles. Raises: InputError as ``read`` does, or if the image
        cannot be scaled."""
        image = self._opened(row)
        if isinstance(image, np.ndarray):
            # A tensor shares memory with no array that is read-only, or whose rows run backward.
            return scaled_image(torch.tensor(np.ascontiguousarray(image)).permute(2, 0, 1), tiling, self.name(row))
        return scaled_pixels(image, tiling, self.name(row))

    def _opened(self, row: int) -> Image.Image | np.ndarray:
        """Returns 8-bit RGB, or an array (H, W, 3) of float32 in [0, 1]."""
        value, name, kind = self.values[row], self.name(row), self.kind
        if value is None or (isinstance(value, float) and np.isnan(value)) or (isinstance(value, str) and not value):
            raise InputError(f"{name}: the column {kind} is empty here")
        if kind == IMAGE:
            return _of_array(value, name)
        if kind == PATH and isinstance(value, (str, Path)):
            image = open_image(str(value))
        elif kind == BYTES and isinstance(value, (bytes, bytearray, memoryview)):
            image = decode_image(bytes(value), name)
        else:
            what = "paths or URLs as text" if kind == PATH else "files' bytes"
            raise InputError(f"{name}: the column {kind} holds {_type(value)}; give {what}")
        return image


def _length(name: str, column: Any) -> int:
    try:
        if not isinstance(column, (str, bytes)):
            return len(column)
    except TypeError:  # an array without dimensions has no length either
        pass
    raise InputError(f"the batch's column {name} is {_type(column)}; give an array or a list, a value for each row")


def _of_array(value: Any, name: str) -> Image.Image | np.ndarray:
    if isinstance(value, Image.Image):
        # As an array, a palette's numbers would be gray values, and CMYK colors with transparency.
        raise InputError(f"{name}: the column {IMAGE} holds {_type(value)}; give np.asarray(image.convert('RGB'))")
    if isinstance(value, (bytes, bytearray, memoryview)):
        raise InputError(f"{name}: the column {IMAGE} holds files' bytes; rename it to {BYTES}")
    if isinstance(value, Mapping):
        raise InputError(
            f"{name}: the column {IMAGE} holds fields ({', '.join(map(str, value))}); give the one of files'"
            f" bytes as the column {BYTES}"
        )
    try:
        array = np.asarray(value)
    except Exception as error:  # tensors on a GPU, ragged lists, whatever calls itself an array
        raise InputError(f"{name}: the column {IMAGE} holds no array ({error})") from error
    if np.issubdtype(array.dtype, np.floating):
        return _checked_floats(array, name)
    return image_from_array(array, name)


def _checked_floats(array: np.ndarray, name: str) -> np.ndarray:
    """Returns an array (H, W, 3) in [0, 1] as float32."""
    if array.ndim != 3 or array.shape[2] != 3 or min(array.shape[:2]) < SMALLEST:
        raise InputError(
            f"{name}: {array.dtype} of shape {array.shape}; give (H, W, 3), at least {SMALLEST} pixels on a side"
        )
    if not (array.min() >= 0 and array.max() <= 1):
        raise InputError(f"{name}: floating-point pixels from {array.min():g} to {array.max():g}; give [0, 1]")
    return array.astype(np.float32, copy=False)


def _resized(array: np.ndarray, image_size: tuple[int, int]) -> Tensor:
    """Returns an array (H, W, 3) of float32 in [0, 1] as a tensor (3, H, W) at ``image_size``, resized by Lanczos.

    Unlike 8-bit images, floats are not rounded and clipped between the two passes of the filter.
    """
    planes = np.ascontiguousarray(array.transpose(2, 0, 1))
    if array.shape[:2] != image_size:
        size = (image_size[1], image_size[0])
        planes = np.stack([np.asarray(Image.fromarray(p).resize(size, Image.Resampling.LANCZOS)) for p in planes])
    return torch.from_numpy(planes.clip(0, 1))


def _type(value: Any) -> str:
    return f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"a value of type {type(value).__name__}"


def result_columns(
    results: Sequence[ImageResult | str], map_size: tuple[int, int] | None = None, *, own_maps: bool = False
) -> Columns:
    """Returns the columns of ``results``, the result or the fault of each row.

    Numbers are float64, NaN where there is none; ``defective`` and ``fault`` hold None there. ``map_size``: (H, W) of
    the column of maps, float32, NaN where there is none. ``own_maps``: each map has a size of its own, in a column of
    objects, None where there is none. Without either there is no such column.
    """
    numbers = np.full((len(NUMBERS), len(results)), np.nan)
    defective, fault = np.full(len(results), None, object), np.full(len(results), None, object)
    maps: np.ndarray | None = None if map_size is None else np.full((len(results), *map_size), np.nan, np.float32)
    if own_maps:
        maps = np.full(len(results), None, object)
    for row, result in enumerate(results):
        if isinstance(result, str):
            fault[row] = result
            continue
        numbers[: len(SCORES), row] = result.score, result.log_score, result.absolute_score
        if result.regions is not None:
            numbers[len(SCORES), row] = result.regions[0].area if result.regions else 0
            if result.regions:
                numbers[len(SCORES) + 1 :, row] = result.regions[0].box
        defective[row] = result.defective
        if maps is not None:
            maps[row] = result.score_map
    columns: Columns = {name: numbers[i] for i, name in enumerate(NUMBERS)}
    columns |= {"defective": defective, "fault": fault}
    return columns if maps is None else columns | {MAP: maps}
