"""Features on disk: computed once, then read in each pass of each run of that extractor, size and pool."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..data import ImageDataset
from ..data.datasets import ConcatImages, Images, Progress
from ..data.fingerprint import image_digest, short_digest, tensor_chunks
from ..data.reader_pool import BATCH_SIZE, ReaderPool, batched, read_images
from ..distributed.process_group import SINGLE_PROCESS, ProcessGroup
from ..errors import InputError
from ..files import ASIDE, locked, shown, write_json, written_aside
from ..models.msflow import MSFlow
from ..settings_diff import changed_settings

# Of what the files hold and of how images become features; a cache of another is stale.
FORMAT = 1
CACHE_DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "float32": torch.float32}
SHARD_BYTES = 256 * 2**20
# Mapped at a time, one mapping per level: a process may have 65530 on Linux.
OPEN_SHARDS = 4096
DESCRIPTION_FILE, IMAGES_FILE = "cache.json", "images.npy"
REMEDY = "remove the folder to have it built anew, or choose another folder"


def dtype_of(name: str) -> torch.dtype:
    """Errors: InputError where ``name`` is not one of CACHE_DTYPES."""
    if name not in CACHE_DTYPES:
        raise InputError(f"a cache of {name!r} is not known; choose one of {', '.join(CACHE_DTYPES)}")
    return CACHE_DTYPES[name]


class FeatureCache:
    """Pooled features of images, before any standardisation, as shards of some images each in ``folder``.

    ``parts``: image sets by name. ``dtype``: bfloat16 or float32. ``shard_bytes``: about so large is a shard of a new
    cache. ``world``: the processes that all make this object, at the same time. A new folder is described at once;
    ``build`` fills it.
    An image is found by its content, whatever its name, place and part: a cache serves every split and every subset of
    its images. So that it cannot be stale, all images' bytes are read here: a few percent of the bytes of one pass.
    Errors: InputError where the cache in ``folder`` is of another extractor, size, pool, dtype or format, lacks images
    (it names what differs), or is damaged; where ``folder`` holds something else or cannot be written.
    """

    def __init__(
        self,
        model: MSFlow,
        parts: Mapping[str, Images],
        folder: Path,
        dtype: torch.dtype = torch.bfloat16,
        shard_bytes: int = SHARD_BYTES,
        world: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.folder = folder
        self.dtype = dtype
        self.model = model
        self.images = ConcatImages(parts.values())
        device = next(model.parameters()).device
        example = model.pooled(torch.zeros(1, 3, *model.image_size, device=device))
        self.shapes = [(level.shape[2], level.shape[3], level.shape[1]) for level in example]
        """(H_l, W_l, C_l): channels lie last."""
        of = _made_of(model, dtype)
        with world.raise_on_any_rank():
            if (folder / DESCRIPTION_FILE).exists():
                _described(folder, of)  # says that it is stale before all images are read
        contents = {part: _contents(images, world) for part, images in parts.items()}
        self._own = np.concatenate(list(contents.values()))
        with world.raise_on_any_rank():
            if not (folder / DESCRIPTION_FILE).exists():
                _begin(folder, of, self._own, max(1, shard_bytes // self.bytes_per_image))
            description = _described(folder, of)
            self._shard_images = int(description["images a shard"])
            self._key = description["key"]
            self._kept = _read_images(folder, description)
            self.rows = {part: self._find(images, contents[part]) for part, images in parts.items()}
        """Where each image of a part lies, (N,) int64."""
        self._mapped = lru_cache(OPEN_SHARDS)(self._map)

    @property
    def bytes_per_image(self) -> int:
        """On disk."""
        return sum(h * w * c for h, w, c in self.shapes) * self.dtype.itemsize

    def missing(self) -> list[int]:
        """Numbers of the shards that are still to be built."""
        count = -(-len(self._kept) // self._shard_images)
        return [shard for shard in range(count) if not self._file(shard).exists()]

    def missing_images(self) -> int:
        """How many images these hold."""
        return sum(len(self._rows_of(shard)) for shard in self.missing())

    def build(
        self,
        readers: ReaderPool | None = None,
        progress: Progress = lambda done: None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Writes those missing shards whose number is ``rank`` modulo ``world_size``, so that as many processes may
        share the work; what an interrupted build left whole is kept.

        ``readers``: who reads the images; None: this process. ``progress`` is called with the number of images done so
        far.
        Errors: InputError where an image cannot be read, another process does the same, or the disk cannot be written;
        shards that are whole stay.
        """
        missing = self.missing()
        todo = [shard for shard in missing if shard % world_size == rank]
        if not todo:
            return
        sources = _places(self._kept, self._own)
        self._check_room(self.missing_images() * self.bytes_per_image)
        done = len(self._kept) - self.missing_images()
        # No batch goes over a shard's end: its features do not depend on where an earlier build ended.
        batches = [sources[rows].tolist() for shard in todo for rows in batched(self._rows_of(shard))]
        if any(source < 0 for batch in batches for source in batch):
            raise InputError(f"{shown(self.folder)}: unfinished, and some of the cache's images are gone; {REMEDY}")
        read = read_images(self.images, batches, readers, next(self.model.parameters()).device)
        with self._claimed(rank, world_size):
            for shard in todo:
                count = len(self._rows_of(shard))
                levels = [torch.empty((count, *shape), dtype=self.dtype) for shape in self.shapes]
                at = 0
                for batch in islice(read, -(-count // BATCH_SIZE)):
                    at += self._compute(batch, [level[at:] for level in levels])
                    progress(done + at)
                done += count
                self._write(shard, levels)

    def take(self, rows: Sequence[int] | np.ndarray) -> list[Tensor]:
        """Features of ``rows``, copied off the disk: (B, C_l, H_l, W_l) per level, channels last, in the cache's dtype.

        Errors: InputError where a shard is missing or damaged.
        """
        levels = [torch.empty((len(rows), *shape), dtype=self.dtype) for shape in self.shapes]
        for i, row in enumerate(rows):
            shard, place = divmod(int(row), self._shard_images)
            for level, mapped in zip(levels, self._mapped(shard), strict=True):
                level[i] = mapped[place]
        return [level.permute(0, 3, 1, 2) for level in levels]

    def _find(self, images: Images, contents: np.ndarray) -> np.ndarray:
        rows = _places(contents, self._kept)
        lacking = np.flatnonzero(rows < 0)
        if len(lacking):
            raise InputError(
                f"{shown(self.folder)}: a feature cache of other images: {len(lacking)} of {len(rows)} are new or"
                f" changed, the first is {_name(images, int(lacking[0]))}; {REMEDY}"
            )
        return rows

    def _rows_of(self, shard: int) -> range:
        first = shard * self._shard_images
        return range(first, min(first + self._shard_images, len(self._kept)))

    def _file(self, shard: int) -> Path:
        return self.folder / f"{shard:06}.safetensors"

    def _check_room(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise InputError(
                f"{shown(self.folder)}: the feature cache needs {binary(needed)} more, and the disk has {binary(free)}"
                " free; free some space or choose another folder"
            )

    @contextmanager
    def _claimed(self, rank: int, world_size: int) -> Iterator[None]:
        with locked(self.folder / f".lock-{rank}-of-{world_size}") as is_ours:
            if not is_ours:
                raise InputError(
                    f"{shown(self.folder)}: another process is building this feature cache; wait for it, or choose"
                    " another folder"
                )
            yield

    @torch.no_grad()
    def _compute(self, images: Tensor, into: Sequence[Tensor]) -> int:
        levels = self.model.pooled(images)
        for store, level in zip(into, levels, strict=True):
            store[: len(level)] = level.permute(0, 2, 3, 1)
        return len(images)

    def _write(self, shard: int, levels: Sequence[Tensor]) -> None:
        path = self._file(shard)
        # A killed process's.
        for aside in self.folder.glob(f".{path.stem}{ASIDE}*"):
            aside.unlink()
        with written_aside(path) as aside:
            save_file({f"level{i}": level for i, level in enumerate(levels)}, aside, metadata={"key": self._key})

    def _map(self, shard: int) -> list[Tensor]:
        path = self._file(shard)
        if not path.exists():
            raise InputError(f"{shown(path)}: missing, the feature cache is not finished; build the rest of it")
        try:
            with safe_open(path, framework="pt") as file:
                key = (file.metadata() or {}).get("key")
                levels = [file.get_tensor(f"level{i}") for i in range(len(self.shapes))]
        except SafetensorError as error:
            raise InputError(f"{shown(path)}: damaged ({error}); remove it to have it built anew") from error
        expected = [(len(self._rows_of(shard)), *shape) for shape in self.shapes]
        if key != self._key or [tuple(level.shape) for level in levels] != expected:
            raise InputError(f"{shown(path)}: of another feature cache; remove it to have it built anew")
        return levels


def binary(size: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if size >= 100 or unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _made_of(model: MSFlow, dtype: torch.dtype) -> dict[str, Any]:
    """What a cache has in common with whatever may use it, its images aside."""
    return {
        "format": FORMAT,
        "extractor": model.extractor.name,
        "extractor weights": _weights(model.extractor),
        "image size": "{}x{}".format(*model.image_size),
        "pool": model.pool,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _weights(extractor: nn.Module) -> str:
    return short_digest(tensor_chunks(extractor.state_dict(), "{name} {dtype} {shape}\n"))


def _contents(images: Images, world: ProcessGroup) -> np.ndarray:
    """(N,) of 16 bytes each: what the images hold. Each process reads its share of them."""
    given = [sample.image for sample in images.samples] if isinstance(images, ImageDataset) else images.images
    with world.raise_on_any_rank():
        own = np.array(
            [bytes.fromhex(image_digest(image))[:16] for image in given[world.rank :: world.size]], dtype="S16"
        )
    contents = np.empty(len(given), "S16")
    for rank, part in enumerate(world.all_gather(own)):
        contents[rank :: world.size] = part
    return contents


def _name(images: Images, index: int) -> str:
    if isinstance(images, ImageDataset):
        return shown(images.samples[index].image)
    given = images.images[index]
    return f"image {index}" if isinstance(given, np.ndarray) else shown(given)


def _begin(folder: Path, of: Mapping[str, Any], contents: np.ndarray, shard_images: int) -> None:
    """Several processes may do this at once: they write the same."""
    names = {path.name for path in folder.iterdir() if path.name[0] != "."} if folder.is_dir() else set()
    if DESCRIPTION_FILE not in names and names - {IMAGES_FILE}:
        raise InputError(f"{shown(folder)}: holds other files and no feature cache; choose another folder")
    with written_aside(folder / IMAGES_FILE) as aside, aside.open("wb") as file:
        np.save(file, contents)
    counts = {"images": len(contents), "images a shard": shard_images, "contents": _sum(contents)}
    key = short_digest([json.dumps([dict(of), counts]).encode()])
    write_json(folder / DESCRIPTION_FILE, {"of": dict(of), **counts, "key": key})


def _described(folder: Path, of: Mapping[str, Any]) -> dict[str, Any]:
    path = folder / DESCRIPTION_FILE
    try:
        description: dict[str, Any] = json.loads(path.read_text())
        before: dict[str, Any] = description["of"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{shown(path)}: damaged ({error!r}); {REMEDY}") from error
    changes = changed_settings(before, of, only_now=True)
    if changes:
        raise InputError(f"{shown(folder)}: a stale feature cache: {changes}; {REMEDY}")
    return description


def _read_images(folder: Path, description: Mapping[str, Any]) -> np.ndarray:
    path = folder / IMAGES_FILE
    try:
        contents: np.ndarray = np.load(path, allow_pickle=False)
        whole = _sum(contents) == description["contents"]
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"{shown(path)}: damaged ({error}); {REMEDY}") from error
    if not whole:
        raise InputError(f"{shown(path)}: damaged; {REMEDY}")
    return contents


def _sum(contents: np.ndarray) -> str:
    return short_digest([contents.tobytes()])


def _places(of: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Where in ``among`` each ``of`` is, int64; -1: nowhere."""
    order = np.argsort(among, kind="stable")
    at = order[np.minimum(np.searchsorted(among, of, sorter=order), len(among) - 1)]
    return np.where(among[at] == of, at, -1)
