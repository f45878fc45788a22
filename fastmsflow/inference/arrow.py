"""Reads the columns of Arrow tables for the scorer, and writes its results as columns of a table."""

from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .columns import BOX, MAP, SCORES, Columns

# float64, so that scores equal those of the other formats to the last bit; Parquet compresses the unused bits.
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
    """Returns whether ``batch`` is a table, or a dict of columns, of Arrow."""
    if isinstance(batch, Mapping):
        return bool(batch) and all(isinstance(column, (pa.Array, pa.ChunkedArray)) for column in batch.values())
    return isinstance(batch, (pa.Table, pa.RecordBatch))


def columns_of(batch: Any) -> Mapping[str, Any]:
    """Returns the columns of a batch of Arrow by name; the last one where several have one name."""
    return batch if isinstance(batch, Mapping) else dict(zip(batch.schema.names, batch.columns, strict=True))


def as_table(batch: Any) -> Any:
    """Returns ``batch`` as a pyarrow.Table."""
    return pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else pa.table(batch)


class Values(Sequence[Any]):
    """A column's values, each converted when it is read, so that the batch is not in memory twice.

    Tensors and nested lists of numbers become arrays, everything else Python's objects, and null None.
    """

    def __init__(self, column: Any) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, row: Any) -> Any:
        value = self._column[row]
        if not value.is_valid:
            return None
        if isinstance(value, pa.StringScalar):
            # Arrow does not check that text is UTF-8, and names of files need not be.
            return value.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")
        if isinstance(value.type, pa.FixedShapeTensorType):
            return value.to_numpy()
        return _array(value) if _is_list(value.type) else value.as_py()


def values(column: Any) -> Any:
    """Returns an Arrow column as Values, any other column as it is."""
    return Values(column) if isinstance(column, (pa.Array, pa.ChunkedArray)) else column


def _is_list(kind: Any) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _array(value: Any) -> Any:
    """Returns nested lists as an array; Python's lists if they are ragged or hold no numbers."""
    flat, shape = value.values, [len(value.values)]
    while _is_list(flat.type):
        lengths = pc.unique(pc.list_value_length(flat)).to_pylist()
        if len(lengths) != 1 or lengths[0] is None:
            return value.as_py()
        shape.append(lengths[0])
        flat = flat.flatten()
    if not (pa.types.is_integer(flat.type) or pa.types.is_floating(flat.type)):
        return value.as_py()
    return flat.to_numpy(zero_copy_only=False).reshape(shape)


def with_results(table: Any, results: Columns) -> Any:
    """Returns ``table`` with ``results`` as its last columns, in the types of RESULTS; NaN becomes null."""
    table = without(table, results)
    for field in RESULTS:
        values = results[field.name]
        if pa.types.is_integer(field.type) or pa.types.is_floating(field.type):
            column = pa.array(values, mask=np.isnan(values), type=pa.float64()).cast(field.type, safe=False)
        else:
            column = pa.array([_utf8(value) for value in values], type=field.type)
        table = table.append_column(field, column)
    if MAP in results:
        maps = results[MAP]
        if maps.dtype == object:
            lists = [None if of_row is None else list(of_row) for of_row in maps]
            return table.append_column(MAP, pa.array(lists, pa.list_(pa.list_(pa.float32()))))
        kind = pa.fixed_shape_tensor(pa.float32(), maps.shape[1:])
        storage = pa.FixedSizeListArray.from_arrays(pa.array(maps.reshape(-1)), int(np.prod(maps.shape[1:])))
        table = table.append_column(pa.field(MAP, kind), pa.ExtensionArray.from_storage(kind, storage))
    return table


def _utf8(value: Any) -> Any:
    """Returns text with escapes for what is not UTF-8."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def without(table: Any, names: Container[str]) -> Any:
    """Returns ``table`` without its columns of these names; the number of rows stays."""
    return table.select([i for i, name in enumerate(table.column_names) if name not in names])
