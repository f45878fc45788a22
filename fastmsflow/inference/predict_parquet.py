"""Scores millions of images into Parquet files on one machine; worker processes read ahead of the model."""

import json
from collections.abc import Callable
from itertools import chain, islice
from typing import Any

import pyarrow as pa

from ..data.fingerprint import short_digest, tensor_chunks
from ..data.image_batches import read_batches
from ..files import as_utf8
from ..number_range import COUNT
from .arrow import RESULTS, with_results
from .columns import result_columns
from .prediction_folder import PATH, PredictionFolder
from .prediction_sources import Files, Shards
from .scorer import Scorer


def settings_of(scorer: Scorer) -> dict[str, Any]:
    """Returns the settings that decide on the results: model (16 hexadecimal digits), thresholds, dtype and engine."""
    weights = tensor_chunks(scorer.model.state_dict(), "{name} {shape} {dtype}")
    return {
        "model": short_digest(chain([json.dumps(scorer.model.config).encode()], weights)),
        "threshold": None if scorer.decision is None else scorer.decision.value,
        "region_threshold": scorer.region_threshold,
        "dtype": scorer.dtype,
        "engine": scorer.engine,
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
    COUNT.check("batch_size", batch_size)
    COUNT.check("images_per_part", images_per_part)
    rows, done = pa.schema([(PATH, pa.string()), *RESULTS]).empty_table(), 0
    # Images that are cut share batches by their tiles.
    at_once = batch_size if scorer.model.tiling is None else 1
    read = read_batches(images.batches(at_once), -(-len(images) // at_once), scorer.reader(), workers)
    scored = scorer.items(read)
    try:
        while some := list(islice(scored, at_once)):
            results = [result or str(fault) for _, result, fault in some]
            names = pa.array([item.name and as_utf8(item.name) for item, _, _ in some], pa.string())
            table = with_results(pa.table({PATH: names}), result_columns(results))
            rows = pa.concat_tables([rows, table])
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
