"""Caches features on disk, for every pass of every run with the same extractor, image size and pool."""

import io
import json
import shutil
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..data import ImageFileDataset
from ..data.datasets import Progress, count_from
from ..data.fingerprint import digest, image_digest, short_digest, tensor_chunks
from ..data.reader_pool import BATCH_SIZE, ReaderPool, batched, read_images
from ..distributed.process_group import SINGLE_PROCESS, ProcessGroup
from ..errors import InputError, cut
from ..files import locked, shown, write_json, written_aside
from ..models.msflow import MSFlow
from ..readable_file import check_file
from ..schema import Within, read_json_file
from ..settings_diff import changed_settings
from .features_in_memory import block_of, pooled_of_batches

# The layout of the files and the way from images to features; a cache of another format is stale.
FORMAT = 1
CACHE_DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "float32": torch.float32}
SHARD_BYTES = 256 * 2**20
# Mapped at a time, one mapping per level: a process may have 65530 on Linux.
OPEN_SHARDS = 4096
DESCRIPTION_FILE, IMAGES_FILE = "cache.json", "images.npy"
REMEDY = "remove the folder to have it built anew, or choose another folder"
ANEW = "remove it to have it built anew"
# KEY is in a shard's header, where a second entry would come in any order; CHECKSUM is a tensor (32,) uint8, which 0.1
# did not write.
KEY, CHECKSUM = "key", "sha256"
DIGEST = np.dtype("S16")

Count = Annotated[int, Within(1)]
Description = TypedDict(
    "Description", {"of": dict[str, Any], "images": Count, "images a shard": Count, "contents": str, "key": str}
)
"""The content of DESCRIPTION_FILE."""


def dtype_of(name: str) -> torch.dtype:
    """Returns the dtype of this name. Raises: InputError if it is not one of CACHE_DTYPES."""
    if name not in CACHE_DTYPES:
        raise InputError(f"a cache of {name!r} is not known; choose one of {', '.join(CACHE_DTYPES)}")
    return CACHE_DTYPES[name]


class FeatureCache:
    """Pooled features of images, before any standardization, in ``folder``, as shards of some images each.

    An image is found by its content, whatever its name, place and split: a cache serves every split and every subset of
    its images. So that a cache cannot be stale, the bytes of all images are read here, which are a few percent of the
    bytes of one pass. A new folder is described at once; ``build`` fills it.

    ``splits``: images by the name of their split. ``dtype``: bfloat16 or float32. ``shard_bytes``: the approximate size
    of a shard in a new cache. ``world``: the processes that all make this object, at the same time.

    Raises: InputError if the cache in ``folder`` is of another extractor, size, pool, dtype or format, lacks images
    (the message names what differs), or is damaged; or if ``folder`` holds something else or cannot be written.
    """

    def __init__(
        self,
        model: MSFlow,
        splits: Mapping[str, ImageFileDataset],
        folder: Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        shard_bytes: int = SHARD_BYTES,
        world: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.folder = folder
        self.dtype = dtype
        self.model = model
        every = [image for images in splits.values() for image in images.images]
        self.images = ImageFileDataset(every, model.image_size)
        device = next(model.parameters()).device
        example = model.pooled(torch.zeros(1, 3, *model.image_size, device=device))
        self.shapes = [(level.shape[2], level.shape[3], level.shape[1]) for level in example]
        """The shape of an image's features per level, (H_l, W_l, C_l): channels lie last."""
        settings = _settings(model, dtype)
        with world.raise_on_any_rank():
            if (folder / DESCRIPTION_FILE).exists():
                _read_description(folder, settings)  # says that it is stale before all images are read
        digests = {split: _image_digests(images, world) for split, images in splits.items()}
        self._given_digests = np.concatenate(list(digests.values()))
        with world.raise_on_any_rank():
            if not (folder / DESCRIPTION_FILE).exists():
                _write_description(folder, settings, self._given_digests, max(1, shard_bytes // self.bytes_per_image))
            description = _read_description(folder, settings)
            self._shard_images = description["images a shard"]
            self._key = description["key"]
            self._digests = _read_digests(folder, description)
            self.rows = {split: self._find(images, digests[split]) for split, images in splits.items()}
        """The row of each image of a split, (N,) int64."""
        self._mapped = lru_cache(OPEN_SHARDS)(self._map)

    @property
    def bytes_per_image(self) -> int:
        """The size of an image's features on disk."""
        return sum(h * w * c for h, w, c in self.shapes) * self.dtype.itemsize

    def missing(self) -> list[int]:
        """Returns the numbers of the shards that are still to be built."""
        count = -(-len(self._digests) // self._shard_images)
        return [shard for shard in range(count) if not self._file(shard).exists()]

    def missing_images(self) -> int:
        """Returns the number of images in these shards."""
        return sum(len(self._rows_of(shard)) for shard in self.missing())

    def build(
        self,
        readers: ReaderPool | None = None,
        progress: Progress = lambda done: None,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Writes those missing shards whose number modulo ``world_size`` is ``rank``, so that several processes can
        share the work. Shards that an interrupted build has finished stay.

        ``readers``: the processes that read the images; None: this one. ``progress`` is called with the number of
        images done so far. Raises: InputError if an image cannot be read, another process does the same work, or the
        disk cannot be written; shards that are finished stay.
        """
        todo = [shard for shard in self.missing() if shard % world_size == rank]
        if not todo:
            return
        sources = _find_digests(self._digests, self._given_digests)
        missing = self.missing_images()
        needed, free = missing * self.bytes_per_image, shutil.disk_usage(self.folder).free
        if needed > free:
            raise InputError(
                f"{shown(self.folder)}: the feature cache needs {binary(needed)} more, and the disk has {binary(free)}"
                " free; free some space or choose another folder"
            )
        done = len(self._digests) - missing
        # No batch goes over a shard's end: its features do not depend on where an earlier build ended.
        numbers = [sources[rows].tolist() for shard in todo for rows in batched(self._rows_of(shard))]
        if any(number < 0 for batch in numbers for number in batch):
            raise InputError(f"{shown(self.folder)}: unfinished, and some of the cache's images are gone; {REMEDY}")
        read = read_images(self.images, numbers, readers, next(self.model.parameters()).device)
        with locked(self.folder / f".lock-{rank}-of-{world_size}") as is_ours:
            if not is_ours:
                raise InputError(
                    f"{shown(self.folder)}: another process is building this feature cache; wait for it, or choose"
                    " another folder"
                )
            for shard in todo:
                count = len(self._rows_of(shard))
                batches = islice(read, -(-count // BATCH_SIZE))
                counted = count_from(done, progress)
                levels = pooled_of_batches(self.model, batches, count, dtype=self.dtype, progress=counted)
                self._write(shard, [level.permute(0, 2, 3, 1) for level in levels])
                done += count

    def check(self, rank: int = 0, world_size: int = 1) -> int:
        """Compares the shards that hold images of the splits with their checksums, once before they are used.

        Each of ``world_size`` processes checks its share, by ``rank``. Returns the number of shards without a checksum,
        which version 0.1 wrote. Raises: InputError if a shard is damaged, missing or of another cache.
        """
        used = np.unique(np.concatenate(list(self.rows.values())) // self._shard_images)
        unknown = 0
        for shard in used[rank::world_size].tolist():
            path = self._file(shard)
            levels, checksum = self._read(shard)
            if checksum is None:
                unknown += 1
            elif not torch.equal(_checksum(shard, levels), checksum):
                raise InputError(f"{shown(path)}: damaged, its checksum is another; {ANEW}")
        return unknown

    def take(self, rows: Sequence[int] | np.ndarray) -> list[Tensor]:
        """Copies the features of ``rows`` off the disk.

        Returns (B, C_l, H_l, W_l) per level, channels last, in the cache's dtype. Raises: InputError if a shard is
        missing or damaged.
        """
        levels = [torch.empty((len(rows), *shape), dtype=self.dtype) for shape in self.shapes]
        for i, row in enumerate(rows):
            shard, row_in_shard = divmod(int(row), self._shard_images)
            for level, mapped in zip(levels, self._mapped(shard), strict=True):
                level[i] = mapped[row_in_shard]
        return [level.permute(0, 3, 1, 2) for level in levels]

    def _find(self, images: ImageFileDataset, digests: np.ndarray) -> np.ndarray:
        rows = _find_digests(digests, self._digests)
        missing = np.flatnonzero(rows < 0).tolist()
        if missing:
            raise InputError(
                f"{shown(self.folder)}: a feature cache of other {images.unit}: {len(missing)} of {len(rows)} are new"
                f" or changed, the first is {shown(images.view_name(missing[0]))}; {REMEDY}"
            )
        return rows

    def _rows_of(self, shard: int) -> range:
        first = shard * self._shard_images
        return range(first, min(first + self._shard_images, len(self._digests)))

    def _file(self, shard: int) -> Path:
        return self.folder / f"{shard:06}.safetensors"

    def _write(self, shard: int, levels: Sequence[Tensor]) -> None:
        tensors = {f"level{i}": level for i, level in enumerate(levels)} | {CHECKSUM: _checksum(shard, levels)}
        content = save(tensors, metadata={KEY: self._key})
        with written_aside(self._file(shard)) as aside:
            aside.write_bytes(content)

    def _map(self, shard: int) -> list[Tensor]:
        return self._read(shard)[0]

    def _read(self, shard: int) -> tuple[list[Tensor], Tensor | None]:
        """Maps the levels of a shard, and returns them with their checksum, if there is one."""
        path = self._file(shard)
        if not path.exists():
            raise InputError(f"{shown(path)}: missing, the feature cache is not finished; build the rest of it")
        if not path.is_file():
            raise InputError(f"{shown(path)}: not a file, but a folder or the like; {ANEW}")
        try:
            with safe_open(path, framework="pt") as file:
                key = (file.metadata() or {}).get(KEY)
                levels = [file.get_tensor(f"level{i}") for i in range(len(self.shapes))]
                checksum = file.get_tensor(CHECKSUM) if CHECKSUM in file.keys() else None  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError) as error:
            raise InputError(f"{shown(path)}: damaged ({cut(str(error))}); {ANEW}") from error
        expected = [((len(self._rows_of(shard)), *shape), self.dtype) for shape in self.shapes]
        if key != self._key or [(tuple(level.shape), level.dtype) for level in levels] != expected:
            raise InputError(f"{shown(path)}: of another feature cache; {ANEW}")
        return levels, checksum


def _checksum(shard: int, levels: Sequence[Tensor]) -> Tensor:
    """Returns the SHA-256 of a shard's number and features, (32,) uint8: two shards that have changed places differ."""
    named = {f"{shard} {i}": level for i, level in enumerate(levels)}
    chunks = tensor_chunks(named, "{name} {shape} {dtype}\n")
    return torch.tensor(list(bytes.fromhex(digest(chunks))), dtype=torch.uint8)


def binary(size: float) -> str:
    """Returns a number of bytes as text with a binary unit."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if size >= 100 or unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _settings(model: MSFlow, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the settings that a cache shares with every run that may use it."""
    return {
        "format": FORMAT,
        "extractor": model.extractor.name,
        "extractor weights": short_digest(tensor_chunks(model.extractor.state_dict(), "{name} {dtype} {shape}\n")),
        "image size": "{}x{}".format(*model.image_size),
        "pool": model.pool,
        # Caches of earlier versions have none of these.
        **{name.replace("_", " "): values for name, values in model.extractor.level_config.items()},
        "dtype": str(dtype).removeprefix("torch."),
    }


def _image_digests(images: ImageFileDataset, world: ProcessGroup) -> np.ndarray:
    """Returns (N,) digests of the images' content, 16 bytes each. Each process reads its share of the images."""
    with world.raise_on_any_rank():
        share = (images.images[number] for number in block_of(world.rank, len(images), world))
        own = np.array([bytes.fromhex(image_digest(image))[:16] for image in share], dtype=DIGEST)
    return np.concatenate(list(world.all_gather(own)))


def _write_description(folder: Path, settings: Mapping[str, Any], digests: np.ndarray, shard_images: int) -> None:
    """Writes the files that describe a new cache. Several processes may do this at once: they write the same."""
    names = {path.name for path in folder.iterdir() if path.name[0] != "."} if folder.is_dir() else set()
    if DESCRIPTION_FILE not in names and names - {IMAGES_FILE}:
        raise InputError(f"{shown(folder)}: holds other files and no feature cache; choose another folder")
    # NumPy's own writer does not say why it could not write.
    content = io.BytesIO()
    np.save(content, digests)
    with written_aside(folder / IMAGES_FILE) as aside:
        aside.write_bytes(content.getbuffer())
    counts = {"images": len(digests), "images a shard": shard_images, "contents": short_digest([digests.tobytes()])}
    key = short_digest([json.dumps([dict(settings), counts]).encode()])
    write_json(folder / DESCRIPTION_FILE, {"of": dict(settings), **counts, "key": key})


def _read_description(folder: Path, settings: Mapping[str, Any]) -> Description:
    """Returns the cache's description. Raises: InputError if it is damaged, or of other settings."""
    path = folder / DESCRIPTION_FILE
    description = read_json_file(path, Description, f"{shown(path)}: damaged", REMEDY)
    changes = changed_settings(description["of"], settings, only_now=True)
    if changes:
        raise InputError(f"{shown(folder)}: a stale feature cache: {changes}; {REMEDY}")
    return description


def _read_digests(folder: Path, description: Description) -> np.ndarray:
    path = folder / IMAGES_FILE
    check_file(path, REMEDY)
    try:
        # Mapped, the array can be no larger than the file, whatever the header says.
        mapped = np.lib.format.open_memmap(path, mode="r")
        if mapped.dtype != DIGEST or mapped.shape != (description["images"],):
            raise ValueError(f"{cut(str(mapped.shape))} of {cut(str(mapped.dtype))}")
        digests = np.array(mapped)
        if short_digest([digests.tobytes()]) != description["contents"]:
            raise ValueError("other contents")
    # numpy parses the header as Python, which may err in any way.
    except Exception as error:
        raise InputError(f"{shown(path)}: damaged ({cut(' '.join(str(error).split()))}); {REMEDY}") from error
    return digests


def _find_digests(wanted: np.ndarray, digests: np.ndarray) -> np.ndarray:
    """Returns the index in ``digests`` of each one of ``wanted``, int64; -1 for one that is not there."""
    order = np.argsort(digests, kind="stable")
    found = order[np.minimum(np.searchsorted(digests, wanted, sorter=order), len(digests) - 1)]
    return np.where(digests[found] == wanted, found, -1)
