"""Scores millions of images into Parquet files on one machine; worker processes read ahead of the model."""

import json
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import pyarrow as pa

from ..data.fingerprint import short_digest, tensor_chunks
from ..data.image_batches import BatchReader, read_batches
from ..files import as_utf8
from ..models.msflow import MSFlow
from .arrow import RESULTS, with_results
from .columns import result_columns
from .prediction_folder import PATH, PredictionFolder
from .prediction_sources import Files, Shards
from .scorer import ImageResult, Scorer

RESULTS_OF_FILES = pa.schema([(PATH, pa.string()), *RESULTS])


def settings_of(scorer: Scorer) -> dict[str, Any]:
    """Returns the settings that decide on the results: model, thresholds and dtype."""
    return {
        "model": fingerprint(scorer.model),
        "threshold": None if scorer.decision is None else scorer.decision.value,
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
    """Scores ``images`` into files of ``images_per_part`` rows; the last one may have fewer.

    ``workers``: processes that read images, see ``read_batches``; ``progress`` is called with the number of images that
    are done.

    Raises: InputError if results cannot be written; RuntimeError if a process that reads is killed.
    """
    rows, done = RESULTS_OF_FILES.empty_table(), 0
    reader = BatchReader(scorer.model.image_size)
    try:
        for read in read_batches(images.batches(batch_size), -(-len(images) // batch_size), reader, workers):
            results = [(item.name, result or str(fault)) for item, result, fault in scorer.items(read)]
            rows = pa.concat_tables([rows, _table(results)])
            while rows.num_rows >= images_per_part:
                folder.write(rows.slice(0, images_per_part))
                rows = rows.slice(images_per_part)
            done += len(results)
            progress(done)
    except (KeyboardInterrupt, RuntimeError):
        # The rows so far are written, so that the next start does not score them again.
        if rows.num_rows:
            folder.write(rows)
        raise
    if rows.num_rows:
        folder.write(rows)


def _table(named_results: Iterable[tuple[str | None, ImageResult | str]]) -> pa.Table:
    paths, results = zip(*named_results, strict=True)
    table = pa.table({PATH: pa.array([path and as_utf8(path) for path in paths], pa.string())})
    return with_results(table, result_columns(results, None))


def fingerprint(model: MSFlow) -> str:
    """Returns 16 hexadecimal digits of a SHA-256 over everything that decides on a score."""
    weights = tensor_chunks(model.state_dict(), "{name} {shape} {dtype}")
    return short_digest(chain([json.dumps(model.config).encode()], weights))
