"""Scores images in Spark by a UDF from a column of images to a column of results. Needs the ``spark`` extra."""

import os
import re
import uuid
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, UnavailableError
from ..inference import AUTO, BatchScorer
from ..inference.columns import BYTES, PATH

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["scorer_udf"]


def scorer_udf(
    model: str | Path,
    threshold: float | None = None,
    false_alarms: float | None = None,
    *,
    dtype: str = AUTO,
    device: str = AUTO,
) -> Any:
    """Returns a pandas UDF over one column of images, or over that and a column of their names, for ``withColumn``.

    The images: a binary column of files' bytes, as ``content`` of ``spark.read.format("binaryFile")``, or a string
    column of paths and URLs. The names are what faults call the images; without them a fault says the number of its
    row in Spark's batch. The result is a struct column, a row for each image; its fields are the results of
    ``fastmsflow.inference.BatchScorer``, null where there is none.

    The arguments are BatchScorer's. ``model``: a path or URL that every executor can read; a Python worker of Spark
    reads it once. ``device``: with auto, a task that Spark has given a GPU uses that one.

    Raises: InputError if an argument is not valid; UnavailableError if Spark is not installed. A job fails with a
    worker's InputError if the model cannot be read, or the column holds neither bytes nor text.
    """
    try:
        import pandas as pd
        from pyspark.sql.functions import pandas_udf
        from pyspark.sql.pandas.types import from_arrow_schema
    except ImportError as error:
        raise UnavailableError(f"scorer_udf needs {error.name}: pip install 'fastmsflow[spark]'") from error
    from ..inference.arrow import RESULTS

    # Raises errors of the arguments now, not in a job.
    BatchScorer(model, threshold, false_alarms, dtype=dtype, device=device)
    number, name = uuid.uuid4().hex, os.fspath(model)

    def score(batches: Iterator[tuple[pd.Series, ...]]) -> Iterator[pd.DataFrame]:
        scorer = _scorer(number, name, threshold, false_alarms, dtype=dtype, device=_device(device))
        for batch in batches:
            yield _results(scorer, batch)

    # The overloads of pandas_udf lack functions with annotations.
    make: Any = pandas_udf
    return make(score, from_arrow_schema(RESULTS))


# Each task of a worker unpickles the UDF again. Two entries, since a job may score rows by two models.
@lru_cache(maxsize=2)
def _scorer(
    number: str, model: str, threshold: float | None, false_alarms: float | None, *, dtype: str, device: str
) -> BatchScorer:
    """Returns the loaded scorer of a UDF; ``number`` is the UDF's own, since its path may hold another model later."""
    return BatchScorer(model, threshold, false_alarms, dtype=dtype, device=device).load()


def _device(device: str) -> str:
    from pyspark import TaskContext

    task = TaskContext.get()
    gpu = task.resources().get("gpu") if device == AUTO and task else None
    return f"cuda:{gpu.addresses[0]}" if gpu else device


def _results(scorer: BatchScorer, batch: "pd.Series | tuple[pd.Series, ...]") -> "pd.DataFrame":
    """Returns the results of a batch: one column alone, or several as a tuple."""
    import pandas as pd

    from ..inference.arrow import RESULTS

    images, *names = batch if isinstance(batch, tuple) else (batch,)
    if len(names) > 1:
        raise InputError(f"scorer_udf got {1 + len(names)} columns; give it the images and, if any, their names")
    kind = _kind(images)
    columns = {kind: images.tolist()}
    if kind == PATH:
        # Spark writes local paths as file:/a/b.png.
        columns[PATH] = [re.sub("^file:/(?!/)", "/", path) if isinstance(path, str) else path for path in columns[PATH]]
    elif names:
        columns[PATH] = names[0].tolist()
    results = scorer(columns)
    # Spark turns NaN into null.
    return pd.DataFrame({name: results[name] for name in RESULTS.names})


def _kind(images: "pd.Series | pd.DataFrame") -> str:
    """Returns the scorer's name for a column of such values."""
    first: Any = b""
    if images.ndim == 1:
        first = next(iter(images.dropna()), b"")
        if isinstance(first, (str, bytes, bytearray)):
            return PATH if isinstance(first, str) else BYTES
    raise InputError(
        f"scorer_udf got a column of {'structs' if images.ndim > 1 else type(first).__name__}; give it a binary column"
        " of images' bytes, or a string column of their paths or URLs"
    )
