"""The folder of a submission: maps that are written one by one, and a record of what they were made of.

- ``submission.json``: for each object the settings that its maps depend on, and its images;
- ``anomaly_images/OBJECT/SPLIT/NAME.tiff``: float16, one channel, of the image's own size;
- ``anomaly_images_thresholded/OBJECT/SPLIT/NAME.png``: 0 or 255;
- ``submission.tar.gz``: these maps and nothing else, once all are there and have been checked.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from PIL import Image

from ..errors import InputError, UnavailableError
from ..files import claimed_folder, remove_leftovers, shown, write_faults, write_json, written_aside
from ..schema import read_json_file
from .plan import PlannedObject, PrivateImage

FORMAT = "fastmsflow submission 1"
RECORD, ARCHIVE = "submission.json", "submission.tar.gz"
MAPS, THRESHOLDED = "anomaly_images", "anomaly_images_thresholded"
LARGEST = float(np.finfo(np.float16).max)
MARKED = 255
AGAIN = "remove it, and the same command makes it again"


class _Entry(TypedDict):
    """The record of an object."""

    settings: dict[str, Any]
    images: dict[str, list[int]]
    """The stamp of each image, by its name."""


class _File(TypedDict):
    format: str
    objects: dict[str, _Entry]


class SubmissionFolder:
    """The folder ``out``, which ``opened`` has claimed.

    Raises: InputError, from all methods, if the disk refuses, see fastmsflow.files.write_faults.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._objects: dict[str, _Entry] = {}

    @classmethod
    @contextmanager
    def opened(cls, out: Path) -> Iterator["SubmissionFolder"]:
        """Claims ``out`` in a with block, and makes it if it is not there.

        Raises: fastmsflow.files.Busy if another process is writing there; InputError if it holds something else.
        """
        with claimed_folder(out):
            folder = cls(out)
            folder._read()
            yield folder

    @property
    def archive(self) -> Path:
        """The file that is uploaded."""
        return self.out / ARCHIVE

    def waiting(self, planned: PlannedObject) -> list[PrivateImage]:
        """Returns the images of an object that have no map yet, or one of other settings or of another image.

        Nothing is written or removed. Raises: InputError if maps would be written behind a link.
        """
        for folder in self._folders(planned):
            self._refuse_links(folder)
        same = self._same(planned)
        return [
            image
            for image in planned.images
            if image.name not in same or not all(map(_is_file, self.paths(planned.name, image)))
        ]

    def begin(self, planned: PlannedObject) -> None:
        """Removes the maps of an object that have other settings or are of other images, before new ones are
        written."""
        folders, same = self._folders(planned), self._same(planned)
        settings, stamps = planned.settings, {image.name: image.stamp() for image in planned.images}
        # A map that is not recorded is removed by the next process, if this one is killed before it does that.
        self._record(planned.name, settings, same)
        for image in planned.images:
            for path in self.paths(planned.name, image) if image.name not in same else ():
                with write_faults(path):
                    path.unlink(missing_ok=True)
        for folder in folders:
            with write_faults(folder):
                folder.mkdir(parents=True, exist_ok=True)
                remove_leftovers(folder)
        self._record(planned.name, settings, stamps)

    def paths(self, name: str, image: PrivateImage) -> tuple[Path, Path]:
        """Returns the files of an image of the object ``name``: its map and its thresholded map."""
        place = f"{name}/{image.name}"
        return self.out / MAPS / f"{place}.tiff", self.out / THRESHOLDED / f"{place}.png"

    def write(self, name: str, image: PrivateImage, score_map: np.ndarray, threshold: float) -> None:
        """Writes both maps of an image of the object ``name``.

        ``score_map``: float32 (H, W) in nats, finite, of the image's own size; values beyond float16's range, 65504,
        become 65504. Pixels above ``threshold`` are marked.
        """
        tiff, png = self.paths(name, image)
        with written_aside(tiff) as aside:
            _tifffile().imwrite(aside, np.minimum(score_map, LARGEST).astype(np.float16))
        with written_aside(png) as aside:
            Image.fromarray(np.where(score_map > threshold, MARKED, 0).astype(np.uint8)).save(aside, format="PNG")

    def check(self, name: str, image: PrivateImage) -> float:
        """Reads both maps of an image of the object ``name``, and returns the share of its pixels that are marked.

        Raises: InputError if one is missing or damaged, or has another size, dtype or values than the server takes.
        """
        tiff, png = self.paths(name, image)
        width, height = image.size
        score_map, marked = _read_tiff(tiff, (height, width)), _read_png(png, (height, width))
        if not np.isfinite(score_map).all():
            raise InputError(f"{shown(tiff)}: has values that are not finite; {AGAIN}")
        if not np.isin(marked, (0, MARKED)).all():
            raise InputError(f"{shown(png)}: has other values than 0 and {MARKED}; {AGAIN}")
        return float((marked == MARKED).mean())

    def _folders(self, planned: PlannedObject) -> set[Path]:
        return {path.parent for image in planned.images for path in self.paths(planned.name, image)}

    def _same(self, planned: PlannedObject) -> dict[str, list[int]]:
        """Returns the stamps of an object's images that are those of the record, made with the same settings."""
        recorded = self._objects.get(planned.name)
        known = recorded["images"] if recorded is not None and recorded["settings"] == planned.settings else {}
        stamps = {image.name: image.stamp() for image in planned.images}
        return {name: stamp for name, stamp in stamps.items() if known.get(name) == stamp}

    def _refuse_links(self, folder: Path) -> None:
        """Raises: InputError if a link leads to ``folder`` from ``out``."""
        for link in (path for path in (folder, *folder.parents) if path.is_relative_to(self.out) and path != self.out):
            if link.is_symlink():
                raise InputError(f"{shown(link)}: is a link, behind which nothing is written or removed; remove it")

    def _read(self) -> None:
        path = self.out / RECORD
        try:
            content = read_json_file(path, _File, f"{shown(path)}: no record of a submission", "choose another folder")
        except FileNotFoundError:
            for name in (MAPS, THRESHOLDED, ARCHIVE):
                if os.path.lexists(self.out / name):
                    raise InputError(
                        f"{shown(self.out / name)}: is in the way, and `submit` has not written it; move it elsewhere,"
                        " or choose another folder"
                    ) from None
            return
        if content["format"] != FORMAT:
            raise InputError(f"{shown(path)}: is of something else; choose another folder")
        self._objects = content["objects"]

    def _record(self, name: str, settings: Mapping[str, Any], images: Mapping[str, list[int]]) -> None:
        entry: _Entry = {"settings": dict(settings), "images": dict(images)}
        if self._objects.get(name) != entry:
            self._objects[name] = entry
            write_json(self.out / RECORD, {"format": FORMAT, "objects": self._objects})


def check_tifffile() -> None:
    """Raises: UnavailableError if the package that writes TIFF files is missing."""
    _tifffile()


def _tifffile() -> Any:
    try:
        import tifffile
    except ModuleNotFoundError as error:
        raise UnavailableError("maps in TIFF need tifffile: pip install 'fastmsflow[submit]'") from error
    return tifffile


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


@contextmanager
def _faults_named(path: Path) -> Iterator[None]:
    """Turns what a damaged file raises in the block into InputError."""
    try:
        yield
    except InputError:
        raise
    # A damaged file can raise nearly anything.
    except Exception as error:
        raise InputError(f"{shown(path)}: cannot be read ({type(error).__name__}); {AGAIN}") from error


def _read_tiff(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Returns a map (H, W) float16. Raises: InputError if the file is damaged, or by its header another image."""
    with _faults_named(path), _tifffile().TiffFile(path) as file:
        # All pages of one size, which a reader takes for one array.
        series = file.series[0]
        _refuse_other(path, f"{'x'.join(map(str, series.shape))} {series.dtype}", shape, "float16")
        return series.asarray()


def _read_png(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Returns a thresholded map (H, W) uint8; the errors are those of ``_read_tiff``."""
    with _faults_named(path), Image.open(path) as image:
        kind = "uint8" if image.mode == "L" else f"of mode {image.mode}"
        _refuse_other(path, f"{image.height}x{image.width} {kind}", shape, "uint8")
        return np.asarray(image)


def _refuse_other(path: Path, found: str, shape: tuple[int, int], dtype: str) -> None:
    """Raises: InputError if a header tells of another image, which might fill the memory, before it is decoded."""
    wanted = f"{shape[0]}x{shape[1]} {dtype}"
    if found != wanted:
        raise InputError(f"{shown(path)}: is {found}, not {wanted} as its image; {AGAIN}")
