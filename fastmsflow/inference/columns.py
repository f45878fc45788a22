"""Columns of a batch -> images, and results -> columns, as NumPy arrays or Arrow arrays."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.images import SMALLEST, as_tensor, decode_image, image_of
from ..data.remote import open_image
from ..errors import InputError
from ..files import shown
from .scorer import Judged

BYTES, IMAGE, PATH, FAULT = "bytes", "image", "path", "fault"
SCORES = ("score", "log_score", "absolute_score")
BOX = ("largest_region_left", "largest_region_top", "largest_region_right", "largest_region_bottom")
NUMBERS = (*SCORES, "largest_region", *BOX)
MAP = "score_map"
Columns: TypeAlias = dict[str, Any]
"""Each column's values: a NumPy array of any shape with the rows first, or a list."""


class Rows(NamedTuple):
    """The images of a batch."""

    kind: str
    """The column that holds them: the first there is of bytes, image and path."""
    values: Sequence[Any]
    names: list[str]
    """What errors call each row: its path if there is one."""
    faults: Sequence[Any]
    """Of each row, the text that says why it is not to be scored, or None."""

    @classmethod
    def of(cls, columns: Mapping[str, Any]) -> "Rows":
        """Errors: InputError where no column holds images, or columns are not of one length."""
        kind = next((name for name in (BYTES, IMAGE, PATH) if name in columns), None)
        if kind is None:
            raise InputError(
                f"the batch has columns {', '.join(columns) or '(none)'}; one of {BYTES}, {IMAGE} and {PATH} must hold"
                " the images: rename it"
            )
        lengths = {name: len(values) for name, values in columns.items()}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise InputError(f"the batch's columns differ in their number of rows ({told}); give each row a value")
        empty = [None] * lengths[kind]
        paths = columns.get(PATH, empty)
        names = [path if isinstance(path, str) and path else f"row {i}" for i, path in enumerate(paths)]
        return cls(kind, columns[kind], names, columns.get(FAULT, empty))

    @property
    def numbers(self) -> range:
        """The rows by number."""
        return range(len(self.names))

    def read(self, row: int, image_size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Decodes one image -> (float32 (3, H, W) in [0, 1] at ``image_size``, its own (width, height)).

        Errors: InputError that names the row.
        """
        value, name, kind = self.values[row], self.names[row], self.kind
        if isinstance(self.faults[row], str):
            raise InputError(self.faults[row])
        if value is None or (isinstance(value, float) and np.isnan(value)):
            raise InputError(f"{shown(name)}: the column {kind} is empty here")
        if kind == IMAGE:
            return _of_array(value, name, image_size)
        expected = str if kind == PATH else (bytes, bytearray, memoryview)
        if not isinstance(value, expected):
            what = "paths or URLs as text" if kind == PATH else "files' bytes"
            raise InputError(f"{shown(name)}: the column {kind} holds {_type(value)}; give {what}")
        image = open_image(value) if isinstance(value, str) else decode_image(bytes(value), name)
        return as_tensor(image, image_size), image.size


def _of_array(value: Any, name: str, image_size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InputError(f"{shown(name)}: the column {IMAGE} holds no array ({error})") from error
    if np.issubdtype(array.dtype, np.floating):
        return _float_tensor(array, shown(name), image_size), (array.shape[1], array.shape[0])
    image = image_of(array, shown(name))
    return as_tensor(image, image_size), image.size


def _float_tensor(array: np.ndarray, name: str, image_size: tuple[int, int]) -> Tensor:
    """(H, W, 3) in [0, 1] -> (3, H, W) at ``image_size``, resized by Lanczos as 8-bit images are, without rounding."""
    if array.ndim != 3 or array.shape[2] != 3 or min(array.shape[:2]) < SMALLEST:
        raise InputError(
            f"{name}: {array.dtype} of shape {array.shape}; give (H, W, 3), at least {SMALLEST} pixels on a side"
        )
    if not (array.min() >= 0 and array.max() <= 1):
        raise InputError(f"{name}: floating-point pixels from {array.min():g} to {array.max():g}; give [0, 1]")
    planes = np.ascontiguousarray(array.transpose(2, 0, 1), dtype=np.float32)
    if array.shape[:2] != image_size:
        size = image_size[::-1]
        planes = np.stack([np.asarray(Image.fromarray(p).resize(size, Image.Resampling.LANCZOS)) for p in planes])
    return torch.from_numpy(planes.clip(0, 1))


def _type(value: Any) -> str:
    return f"{value.dtype} arrays" if isinstance(value, np.ndarray) else type(value).__name__


def result_columns(results: Sequence[Judged | str], map_size: tuple[int, int] | None) -> Columns:
    """Columns of ``results``, one for each row: what the model says, or its fault. Numbers are float64, NaN where
    there is none; ``defective`` and ``fault`` hold None there. ``map_size``: (H, W) of the column of maps, if any."""
    numbers = np.full((len(NUMBERS), len(results)), np.nan)
    defective, fault = np.full(len(results), None, object), np.full(len(results), None, object)
    maps = None if map_size is None else np.full((len(results), *map_size), np.nan, np.float32)
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
