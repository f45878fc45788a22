"""Images of several sizes that the tests of scoring batches use, and what their results must be."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from fastmsflow.inference import BatchScorer

SIZE = (32, 48)
"""(H, W) of the model."""
SIZES = [(40, 36), (32, 48), (36, 40), (64, 32)]
"""(H, W) of the images, in turn."""
IMAGES = 12
SCORES = ("score", "log_score", "absolute_score")
BOX = ("largest_region_left", "largest_region_top", "largest_region_right", "largest_region_bottom")
RESULTS = {*SCORES, "defective", "largest_region", *BOX, "fault"}


def assert_same(results: Mapping[str, Any], expected: Mapping[str, Any], rows: Any = slice(None)) -> None:
    """Asserts that every column of results is equal to the bit; NaN counts as equal to NaN."""
    for name in sorted(RESULTS):
        np.testing.assert_array_equal(results[name], np.asarray(expected[name])[rows], err_msg=name)


def objects(values: list[Any]) -> np.ndarray:
    """An array of any objects, one a row."""
    result = np.empty(len(values), object)
    for row, value in enumerate(values):
        result[row] = value
    return result


def as_numpy(results: Any) -> dict[str, Any]:
    """An Arrow table's columns as a dict's would be, after a look at their types."""
    import pyarrow as pa

    from fastmsflow.inference import arrow

    assert [results.schema.field(name).type for name in arrow.RESULTS.names] == list(arrow.RESULTS.types)
    columns = {}
    for name in arrow.RESULTS.names:
        values = results[name].to_pylist()
        assert not any(value != value for value in values), f"{name} has NaN in the place of null"
        numbers = arrow.RESULTS.field(name).type not in (pa.string(), pa.bool_())
        columns[name] = np.array(values, np.float64 if numbers else object)
    return columns


def assert_as_expected(results: Any, expected: Mapping[str, Any]) -> None:
    """Reads the rows of an Arrow table, whose boxes are float32."""
    boxes = {name: column.astype(np.float32) for name, column in expected.items() if name.startswith("largest_region_")}
    assert_same(as_numpy(results), {**expected, **boxes})


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def on_cpu(model: object, **options: Any) -> BatchScorer:
    return BatchScorer(model, **{"dtype": "float32", "device": "cpu", **options})  # type: ignore[arg-type]
