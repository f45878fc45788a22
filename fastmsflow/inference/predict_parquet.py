"""Images by the million -> Parquet, on one machine: worker processes read ahead of the model, part by part."""

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
