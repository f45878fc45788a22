"""Batches as Arrow tables: their columns as the scorer reads them, and its results as columns of a table."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from .columns import BOX, MAP, SCORES, Columns

# Scores in float64, the values that the other formats print to the last bit and that thresholds are compared with; what
# float32 leaves empty of it compresses well.
RESULTS = pa.schema(
    [
        *((name, pa.float64()) for name in SCORES),
        ("defective", pa.bool_()),
        ("largest_region", pa.int64()),
        *((name, pa.float32()) for name in BOX),
        ("fault", pa.string()),
    ]
)
"""The columns of results: scores in nats (``score`` in [0, 1]), the largest region's area and box in pixels."""


def is_arrow(batch: Any) -> bool:
    """Whether ``batch`` is a table, or a dict of columns, of Arrow."""
    if isinstance(batch, Mapping):
        return bool(batch) and all(isinstance(column, (pa.Array, pa.ChunkedArray)) for column in batch.values())
    return isinstance(batch, (pa.Table, pa.RecordBatch))


def as_table(batch: Any) -> Any:
    """``batch`` as a pyarrow.Table."""
    return pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else pa.table(batch)


def values(column: Any) -> Any:
    """A column's values for the scorer: arrays where they are tensors or nested lists, else a list."""
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        if isinstance(column, pa.ChunkedArray):
            return [value for chunk in column.chunks for value in _tensors(chunk)]
        return _tensors(column)
    leaf = kind
    while pa.types.is_list(leaf) or pa.types.is_large_list(leaf) or pa.types.is_fixed_size_list(leaf):
        leaf = leaf.value_type
    if leaf is kind or not (pa.types.is_integer(leaf) or pa.types.is_floating(leaf)):
        return column.to_pylist()
    return [None if value is None else _array(value, leaf.to_pandas_dtype()) for value in column.to_pylist()]


def _tensors(array: Any) -> Any:
    if isinstance(array, pa.FixedShapeTensorArray):
        return array.to_numpy_ndarray()
    # Ray's tensors, of one shape or several.
    return array.to_numpy(zero_copy_only=False)


def _array(value: Any, dtype: Any) -> Any:
    try:
        return np.array(value, dtype)
    except ValueError:
        # Ragged rows: the scorer says so.
        return value


def with_results(table: Any, results: Columns) -> Any:
    """``table`` with ``results`` as its last columns, in the types of RESULTS; NaN becomes null."""
    for field in RESULTS:
        found = results[field.name]
        if pa.types.is_integer(field.type) or pa.types.is_floating(field.type):
            column = pa.array(found, mask=np.isnan(found), type=pa.float64()).cast(field.type, safe=False)
        else:
            column = pa.array(found.tolist(), type=field.type)
        table = _put(table, field, column)
    if MAP in results:
        maps = results[MAP]
        kind = pa.fixed_shape_tensor(pa.float32(), maps.shape[1:])
        storage = pa.FixedSizeListArray.from_arrays(pa.array(maps.reshape(-1)), int(np.prod(maps.shape[1:])))
        table = _put(table, pa.field(MAP, kind), pa.ExtensionArray.from_storage(kind, storage))
    return table


def _put(table: Any, field: Any, column: Any) -> Any:
    if field.name in table.column_names:
        table = table.drop_columns([field.name])
    return table.append_column(field, column)
