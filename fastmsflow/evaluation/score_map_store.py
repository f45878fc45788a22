"""Stores score maps of many images on disk, and reads them one at a time."""

import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

import numpy as np

from ..distributed.process_group import SINGLE_PROCESS, ProcessGroup
from ..errors import InputError
from ..files import aside_folder, write_faults


class ScoreMapStore:
    """Stores maps (H, W), float32, by the images' numbers in a temporary file: 4 H W bytes an image.

    The file is removed when this object is deleted or closed, or its process is killed. Each of several processes
    writes a file of its own into a folder that all of them see; after ``gather`` the first one reads them all.
    """

    def __init__(self, folder: Path, world: ProcessGroup = SINGLE_PROCESS) -> None:
        """Opens the file in ``folder`` or, if that does not exist, in the nearest folder above that does."""
        self._world = world
        self._where: dict[int, tuple[int, int, tuple[int, ...]]] = {}  # number -> file, first byte, shape
        self._name = folder / "maps"
        with write_faults(self._name):
            there = next(path for path in (folder, *folder.parents) if path.is_dir())
            if world.size == 1:
                # The file has no name if the system supports that.
                self._files = [tempfile.TemporaryFile(dir=there, buffering=0)]  # noqa: SIM115
            else:
                self._path = aside_folder(there / "maps") / "maps"
                self._files = [self._path.open("w+b", buffering=0)]
        weakref.finalize(self, _close, self._files)

    def __len__(self) -> int:
        return len(self._where)

    def add(self, numbers: Sequence[int], maps: np.ndarray) -> None:
        """Writes ``maps`` (B, H, W) float32 of the images of ``numbers``.

        Raises: InputError if they cannot be written, see fastmsflow.files.write_faults.
        """
        if not len(maps):
            return
        with write_faults(self._name):
            start = self._files[0].seek(0, os.SEEK_END)
            rest = memoryview(np.ascontiguousarray(maps, dtype=np.float32).data).cast("B")
            while rest:
                rest = rest[self._files[0].write(rest) :]
        shape = maps.shape[1:]
        self._where |= {number: (0, start + i * 4 * maps[0].size, shape) for i, number in enumerate(numbers)}

    def gather(self) -> "ScoreMapStore | None":
        """Returns this store with the maps of all processes on the first process, None on the others; all call this."""
        if self._world.size == 1:
            return self
        stores = self._world.all_gather((self._path, self._where))
        if not self._world.first:
            return None
        for file, (path, where) in enumerate(stores):
            if file:
                self._files.append(path.open("rb", buffering=0))
                self._where |= {number: (file, start, shape) for number, (_, start, shape) in where.items()}
            shutil.rmtree(path.parent)
        return self

    def __getitem__(self, number: int) -> np.ndarray:
        """Returns the map (H, W) float32 of an image. Raises: KeyError if the image was not added."""
        file, start, shape = self._where[number]
        score_map = np.empty(shape, np.float32)
        rest = memoryview(score_map.data).cast("B")
        self._files[file].seek(start)
        while rest:
            count = self._files[file].readinto(rest)
            if not count:
                raise InputError(f"{self._name}: a temporary file of maps was cut short; run it again")
            rest = rest[count:]
        return score_map

    def close(self) -> None:
        """Removes the file; the maps cannot be read any more."""
        _close(self._files)


def _close(files: list[FileIO]) -> None:
    for file in files:
        file.close()
