"""Scoring in Spark: a UDF that takes a column of images and returns a column of results. Needs the ``spark`` extra."""

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

    Errors: InputError where an argument cannot be had; UnavailableError where Spark is not installed. A job fails with
    one such line of a worker where the model cannot be read, or the column holds neither bytes nor text.
    """
    try:
        import pandas as pd
        from pyspark.sql.functions import pandas_udf
        from pyspark.sql.pandas.types import from_arrow_schema
    except ImportError as error:
        raise UnavailableError(f"scorer_udf needs {error.name}: pip install 'fastmsflow[spark]'") from error
    from ..inference.arrow import RESULTS

    # Says now what is wrong with the arguments.
    BatchScorer(model, threshold, false_alarms, dtype, device=device)
    number, name = uuid.uuid4().hex, os.fspath(model)

    def score(batches: Iterator[tuple[pd.Series, ...]]) -> Iterator[pd.DataFrame]:
        scorer = _scorer(number, name, threshold, false_alarms, dtype, _device(device))
        for batch in batches:
            yield _results(scorer, batch)

    # Its overloads know nothing of functions with annotations.
    make: Any = pandas_udf
    return make(score, from_arrow_schema(RESULTS))


# A worker goes on to the next task, which brings the UDF anew. Two: rows may be scored by two models.
@lru_cache(maxsize=2)
def _scorer(
    number: str, model: str, threshold: float | None, false_alarms: float | None, dtype: str, device: str
) -> BatchScorer:
    """``number``: the UDF's own, since behind the same path there may be another model by the next."""
    return BatchScorer(model, threshold, false_alarms, dtype, device=device).load()


def _device(device: str) -> str:
    from pyspark import TaskContext

    task = TaskContext.get()
    gpu = task.resources().get("gpu") if device == AUTO and task else None
    return f"cuda:{gpu.addresses[0]}" if gpu else device


def _results(scorer: BatchScorer, batch: "pd.Series | tuple[pd.Series, ...]") -> "pd.DataFrame":
    """``batch``: Spark hands over a column alone, and several as a tuple."""
    import pandas as pd

    from ..inference.arrow import RESULTS

    images, *names = batch if isinstance(batch, tuple) else (batch,)
    if len(names) > 1:
        raise InputError(f"scorer_udf got {1 + len(names)} columns; give it the images and, if any, their names")
    kind = _kind(images)
    columns = {kind: images.tolist()}
    if kind == PATH:
        # As Spark writes its own: file:/a/b.png.
        columns[PATH] = [re.sub("^file:/(?!/)", "/", path) if isinstance(path, str) else path for path in columns[PATH]]
    elif names:
        columns[PATH] = names[0].tolist()
    results = scorer(columns)
    # Spark makes null of NaN.
    return pd.DataFrame({name: results[name] for name in RESULTS.names})


def _kind(images: "pd.Series | pd.DataFrame") -> str:
    """The scorer's name for a column of such values."""
    found: Any = b""
    if images.ndim == 1:
        found = next(iter(images.dropna()), b"")
        if isinstance(found, (str, bytes, bytearray)):
            return PATH if isinstance(found, str) else BYTES
    raise InputError(
        f"scorer_udf got a column of {'structs' if images.ndim > 1 else type(found).__name__}; give it a binary column"
        " of images' bytes, or a string column of their paths or URLs"
    )
