"""Images by the million -> Parquet, on one machine: worker processes read ahead of the model, part by part."""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, groupby
from typing import Any

import pyarrow as pa

from ..data.fingerprint import short_digest, tensor_chunks
from ..data.image_batches import BatchReader, ImageBatch, ShardBatches, file_batches, read_batches
from ..files import as_utf8
from ..models.msflow import MSFlow
from .arrow import RESULTS, with_results
from .columns import result_columns
from .prediction_folder import PATH, PredictionFolder
from .scorer import ImageResult, Scorer

RESULTS_OF_FILES = pa.schema([(PATH, pa.string()), *RESULTS])


class Files:
    """Images that are files or URLs."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def waiting(self, folder: PredictionFolder) -> "Files":
        """Returns those that ``folder`` has no rows of."""
        return Files(folder.remaining(self.paths))

    def batches(self, size: int) -> Iterator[ImageBatch]:
        """Yields the images, ``size`` at once."""
        return file_batches(self.paths, size)


class Shards:
    """Images in a set of shards; ``where``: see fastmsflow.data.shards.storage.ShardStorage."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.set = ShardBatches(where)
        self.done: dict[str, frozenset[str]] = {}
        """The images of each shard that have rows."""

    def __len__(self) -> int:
        return sum(shard.images - len(self.done.get(shard.name, ())) for shard in self.set.manifest.shards)

    def waiting(self, folder: PredictionFolder) -> "Shards":
        """Returns those that ``folder`` has no rows of; what was lost with a damaged shard is tried again."""
        names = {self.set.name(shard): shard.name for shard in self.set.manifest.shards}
        folder.drop_lost(names)
        scored = sorted(path for path in folder.scored().to_pylist() if path is not None)
        # A path is its shard's and the image's own, which may have slashes of its own.
        by_tar = groupby(scored, lambda path: next((tar for tar in _parents(path) if tar in names), None))
        result = Shards(self.where)
        for tar, paths in by_tar:
            if tar is not None:
                result.done[names[tar]] = result.done.get(names[tar], frozenset()) | set(paths)
        return result

    def batches(self, size: int) -> Iterator[ImageBatch]:
        """Yields the images, ``size`` at once; shards that are done are not opened."""
        for shard in self.set.manifest.shards:
            done = self.done.get(shard.name, frozenset())
            if len(done) < shard.images:
                yield from self.set.batches(shard, size, done)


def _parents(path: str) -> Iterator[str]:
    place = path.find("/")
    while place >= 0:
        yield path[:place]
        place = path.find("/", place + 1)


def setting_of(scorer: Scorer) -> dict[str, Any]:
    """What results hang on."""
    return {
        "model": fingerprint(scorer.model),
        "threshold": None if scorer.limit is None else scorer.limit.value,
        "region_threshold": scorer.region_threshold,
        "dtype": scorer.dtype,
    }


def score_into(
    folder: PredictionFolder,
    images: Files | Shards,
    scorer: Scorer,
    *,
    batch_size: int,
    images_per_part: int,
    workers: int,
    progress: Callable[[int], None],
) -> None:
    """Scores ``images`` into parts of ``images_per_part`` rows, the last one of fewer. ``workers``: see
    ``read_batches``; ``progress`` gets the number of images that are through.

    Errors: InputError where results cannot be written; RuntimeError where a process that reads is killed.
    """
    rows, done = RESULTS_OF_FILES.empty_table(), 0
    reader = BatchReader(scorer.model.image_size)
    try:
        for read in read_batches(images.batches(batch_size), -(-len(images) // batch_size), reader, workers):
            judged = [(item.name, result or str(fault)) for item, result, fault in scorer.items(read)]
            rows = pa.concat_tables([rows, _table(judged)])
            while rows.num_rows >= images_per_part:
                folder.write(rows.slice(0, images_per_part))
                rows = rows.slice(images_per_part)
            done += len(judged)
            progress(done)
    except (KeyboardInterrupt, RuntimeError):
        # What is scored is not scored again.
        if rows.num_rows:
            folder.write(rows)
        raise
    if rows.num_rows:
        folder.write(rows)


def _table(judged: Iterable[tuple[str | None, ImageResult | str]]) -> pa.Table:
    paths, results = zip(*judged, strict=True)
    table = pa.table({PATH: pa.array([path and as_utf8(path) for path in paths], pa.string())})
    return with_results(table, result_columns(results, None))


def fingerprint(model: MSFlow) -> str:
    """Returns 16 hexadecimal digits of a SHA-256 over weights, calibration and what else decides on a score."""
    weights = tensor_chunks(model.state_dict(), "{name} {shape} {dtype}")
    return short_digest(chain([json.dumps(model.config).encode()], weights))
