"""Every form that a batch's columns may have: the same results, a fault in the row, or one line."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastmsflow.inference import BatchScorer
from fastmsflow.inference.columns import BatchColumns
from tests.helpers.batches import IMAGES, RESULTS, SIZE, as_numpy, assert_as_expected, assert_same, objects, png
from tests.helpers.tolerances import RESIZED_FLOAT

pa = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'fastmsflow[shards]'")

arrow = pytest.importorskip("fastmsflow.inference.arrow")

Results = dict[str, Any]
OF_SIZE = range(1, IMAGES, 4)
"""The images that are of the model's size."""


# Files' bytes


BYTES: dict[str, Callable[[list[bytes]], Any]] = {
    "a list": list,
    "a tuple": tuple,
    "an array of objects": objects,
    "np.bytes_": np.array,
    "bytearrays": lambda contents: [bytearray(content) for content in contents],
    "memoryviews": lambda contents: [memoryview(content) for content in contents],
}
ARROW_BYTES: dict[str, Callable[[list[bytes]], Any]] = {
    "binary": lambda contents: pa.array(contents, pa.binary()),
    "large_binary": lambda contents: pa.array(contents, pa.large_binary()),
    "binary_view": lambda contents: pa.array(contents, pa.binary_view()),
    "chunks": lambda contents: pa.chunked_array([contents[:5], [], contents[5:]], pa.binary()),
    "a slice": lambda contents: pa.array([b"other", *contents, b"other"], pa.binary())[1:-1],
    "a dictionary": lambda contents: pa.array(contents, pa.binary()).dictionary_encode(),
}


@pytest.mark.parametrize("form", BYTES)
def test_bytes_in_every_form_of_numpy(
    form: str, scorer: BatchScorer, batch_contents: list[bytes], expected: Results
) -> None:
    results = scorer({"bytes": BYTES[form](batch_contents)})
    assert set(results) == RESULTS
    assert_same(results, expected)


@pytest.mark.parametrize("form", ARROW_BYTES)
def test_bytes_in_every_form_of_arrow(
    form: str, scorer: BatchScorer, batch_contents: list[bytes], expected: Results
) -> None:
    column = ARROW_BYTES[form](batch_contents)
    assert_as_expected(scorer({"bytes": column}), expected)
    assert_as_expected(scorer(pa.table({"bytes": column})), expected)
    if isinstance(column, pa.Array):
        assert_as_expected(scorer(pa.RecordBatch.from_arrays([column], ["bytes"])), expected)
    mixed = scorer({"bytes": column, "number": np.arange(IMAGES)})
    assert_same(mixed, expected)


# Arrays


def test_arrays_of_several_sizes_and_of_one(
    scorer: BatchScorer, batch_arrays: list[np.ndarray], expected: Results
) -> None:
    assert_same(scorer({"image": batch_arrays}), expected)
    assert_same(scorer({"image": objects(batch_arrays)}), expected)
    assert_same(scorer({"image": [torch.from_numpy(array) for array in batch_arrays]}), expected)
    assert_same(scorer({"image": [np.asfortranarray(array) for array in batch_arrays]}), expected)
    of_size = [batch_arrays[i] for i in OF_SIZE]
    wanted = scorer({"image": of_size})
    assert_same(scorer({"image": np.stack(of_size)}), wanted)
    assert_same(scorer({"image": torch.from_numpy(np.stack(of_size))}), wanted)


def test_grey_transparent_and_16_bit_arrays_are_as_their_files(
    scorer: BatchScorer, batch_arrays: list[np.ndarray]
) -> None:
    grey, sixteen = batch_arrays[0][..., 0], batch_arrays[0][..., 0].astype(np.uint16) * 257 + 100
    transparent = np.dstack([batch_arrays[0], batch_arrays[1][:1, :1, 0].repeat(40, 0).repeat(36, 1)])
    for array in (grey, sixteen, transparent):
        results = scorer({"image": [array, array]})
        assert list(results["fault"]) == [None, None]
        assert_same(results, scorer({"bytes": [png(array)] * 2}))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_arrays_of_floats_are_as_the_bytes_they_are_shares_of(
    dtype: str, scorer: BatchScorer, batch_arrays: list[np.ndarray]
) -> None:
    of_size = [batch_arrays[i] for i in OF_SIZE]
    floats = [np.divide(array, 255, dtype=np.float32).astype(dtype) for array in of_size]
    rounded = [array.astype(np.float32) for array in floats]
    results = scorer({"image": floats})
    assert_same(results, scorer({"image": rounded}))
    if dtype != "float16":
        assert_same(results, scorer({"image": of_size}))
    assert_same(scorer({"image": np.stack(floats)}), results)


def test_floats_are_resized_as_bytes_are_but_for_rounding(batch_arrays: list[np.ndarray]) -> None:
    # Without black and white: Lanczos overshoots them, and what is 8 bits is clipped there between its two passes.
    grey = [64 + array // 2 for array in batch_arrays]
    rows = BatchColumns.from_batch({"image": [*grey, *(np.float32(array / 255) for array in grey)]})
    for row, array in enumerate(grey):
        (of_bytes, size), (of_floats, other) = rows.read(row, SIZE), rows.read(IMAGES + row, SIZE)
        assert size == other == array.shape[1::-1]
        assert of_floats.dtype == torch.float32
        difference = float((of_bytes - of_floats).abs().max())
        assert (row in OF_SIZE) == (difference == 0)
        assert difference <= RESIZED_FLOAT


def fixed(arrays: list[np.ndarray]) -> Any:
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack(arrays))


def nested(kind: Callable[..., Any]) -> Callable[[list[np.ndarray]], Any]:
    return lambda arrays: pa.array([array.tolist() for array in arrays], kind(kind(kind(pa.uint8()))))


def ray_tensors(arrays: list[np.ndarray]) -> Any:
    extensions = pytest.importorskip("ray.data.extensions", reason="needs Ray")
    same = len({array.shape for array in arrays}) == 1
    kind = extensions.ArrowTensorArray if same else extensions.ArrowVariableShapedTensorArray
    return kind.from_numpy(np.stack(arrays) if same else objects(arrays))


ARROW_OF_SIZE: dict[str, Callable[[list[np.ndarray]], Any]] = {
    "tensors": fixed,
    "sliced tensors": lambda arrays: fixed([arrays[-1], *arrays, arrays[0]])[1:-1],
    "chunks of tensors": lambda arrays: pa.chunked_array([fixed(arrays[:1]), fixed(arrays[1:])]),
    "fixed lists": lambda arrays: pa.array(
        [array.tolist() for array in arrays],
        pa.list_(pa.list_(pa.list_(pa.uint8(), 3), SIZE[1]), SIZE[0]),
    ),
    "Ray's tensors": ray_tensors,
    "chunks of Ray's tensors": lambda arrays: pa.chunked_array([ray_tensors(arrays[:1]), ray_tensors(arrays[1:])]),
}
ARROW_OF_SIZES: dict[str, Callable[[list[np.ndarray]], Any]] = {
    "lists": nested(pa.list_),
    "large lists": nested(pa.large_list),
    "chunks of lists": lambda arrays: pa.chunked_array([nested(pa.list_)(arrays[:5]), nested(pa.list_)(arrays[5:])]),
    "Ray's tensors": ray_tensors,
}


@pytest.mark.parametrize("form", ARROW_OF_SIZE)
def test_arrays_of_one_size_in_every_form_of_arrow(
    form: str, scorer: BatchScorer, batch_arrays: list[np.ndarray]
) -> None:
    of_size = [batch_arrays[i] for i in OF_SIZE]
    assert_as_expected(scorer({"image": ARROW_OF_SIZE[form](of_size)}), scorer({"image": of_size}))


@pytest.mark.parametrize("form", ARROW_OF_SIZES)
def test_arrays_of_several_sizes_in_every_form_of_arrow(
    form: str, scorer: BatchScorer, batch_arrays: list[np.ndarray], expected: Results
) -> None:
    assert_as_expected(scorer({"image": ARROW_OF_SIZES[form](batch_arrays)}), expected)


def test_nulls_of_arrow_are_faults_in_their_rows(
    scorer: BatchScorer, batch_arrays: list[np.ndarray], batch_contents: list[bytes]
) -> None:
    tensors = fixed([batch_arrays[1], batch_arrays[5]])
    kind, storage = tensors.type, tensors.storage
    gap = pa.ExtensionArray.from_storage(kind, pa.array([None, *storage.to_pylist()], storage.type))
    wanted = scorer({"image": [None, batch_arrays[1], batch_arrays[5]]})
    assert wanted["fault"].tolist() == ["row 0: the column image is empty here", None, None]
    assert_as_expected(scorer({"image": gap}), wanted)
    lists = [None, batch_arrays[1].tolist(), batch_arrays[5].tolist()]
    assert_as_expected(scorer({"image": pa.array(lists, pa.list_(pa.list_(pa.list_(pa.uint8()))))}), wanted)
    results = as_numpy(scorer({"bytes": pa.array([None, batch_contents[1]], pa.binary())}))
    assert results["fault"].tolist() == ["row 0: the column bytes is empty here", None]


# Paths, precedence, other columns


@pytest.mark.parametrize("form", ["text", "Path", "np.str_", "objects", "URL", "Arrow", "large Arrow", "dictionary"])
def test_paths_in_every_form(form: str, scorer: BatchScorer, batch_images: list[Path], expected: Results) -> None:
    names = [str(path) for path in batch_images]
    if form == "URL":
        pytest.importorskip("fsspec")
    column = {
        "text": names,
        "Path": batch_images,
        "np.str_": np.array(names),
        "objects": objects(names),
        "URL": [f"file://{name}" for name in names],
        "Arrow": pa.array(names),
        "large Arrow": pa.array(names, pa.large_string()),
        "dictionary": pa.array(names).dictionary_encode(),
    }[form]
    results = scorer({"path": column})
    if isinstance(column, pa.Array):
        assert results["path"].to_pylist() == names
        assert_as_expected(results, expected)
    else:
        assert results["path"] is column
        assert_same(results, expected)


def test_names_that_are_no_utf8_are_read_and_told(
    scorer: BatchScorer, batch_contents: list[bytes], tmp_path: Path
) -> None:
    names = [bytes(tmp_path) + b"/caf\xe9.png", bytes(tmp_path) + b"/none\xff\n.png"]
    Path(names[0].decode(errors="surrogateescape")).write_bytes(batch_contents[0])
    text = pa.array(names, pa.binary()).view(pa.string())
    results = scorer(pa.table({"path": text, "fault": pa.array([None, b"\xff!"], pa.binary()).view(pa.string())}))
    assert results["fault"].to_pylist() == [None, "\\udcff!"]
    decoded = [name.decode(errors="surrogateescape") for name in names]
    faults = scorer({"path": [*decoded, "\ud800.png", "nul\0.png", "x" * 5000 + ".png", ""]})["fault"]
    assert faults[0] is None
    assert faults[1] == f"{tmp_path}/none\\xff\\n.png: no such file"
    assert faults[2].startswith("\\ud800.png: ")
    assert faults[3].startswith("nul\\x00.png: ")
    assert "no such file (File name too long)" in faults[4]
    assert faults[5] == "row 5: the column path is empty here"


def test_bytes_come_before_arrays_and_arrays_before_paths(
    scorer: BatchScorer, batch_arrays: list[np.ndarray], batch_contents: list[bytes], batch_images: list[Path]
) -> None:
    path = [str(batch_images[2])]
    first, second, third = (scorer({"path": [str(batch_images[i])]}) for i in range(3))
    assert len({float(results["score"][0]) for results in (first, second, third)}) == 3
    assert_same(scorer({"path": path, "image": [batch_arrays[1]], "bytes": [batch_contents[0]]}), first)
    assert_same(scorer({"path": path, "image": [batch_arrays[1]]}), second)
    table = scorer(pa.table({"path": path, "image": fixed([batch_arrays[1]])}))
    assert table["score"].to_pylist() == second["score"].tolist()
    # A name that errors tell, whatever is there.
    assert scorer({"path": path, "bytes": [b"no"]})["fault"][0].startswith(f"{batch_images[2]}: not an image")


def test_other_columns_are_kept_in_their_order_before_the_results(
    scorer: BatchScorer, batch_contents: list[bytes], batch_images: list[Path]
) -> None:
    columns = OrderedDict(z=[1, 2], bytes=batch_contents[:2], fault=["gone before", None], path=["a", "b"],
                          score=["x", "y"], image=[None, None], tags=[["p"], []])  # fmt: skip
    results = scorer(columns)
    names = ["z", "path", "tags"]
    assert list(results)[:3] == names
    assert set(results) == RESULTS | set(names)
    assert results["z"] is columns["z"]
    table = pa.table({**columns, "image": pa.nulls(2)}, metadata={"made": "by hand"})
    found = scorer(table)
    assert found.column_names == [*names, *arrow.RESULTS.names]
    assert found["tags"].to_pylist() == [["p"], []]
    assert found["score"].to_pylist() == [None, results["score"][1]]
    assert table.column_names == list(columns)


def test_a_row_with_a_fault_keeps_it_in_one_line_and_is_not_read(
    scorer: BatchScorer, batch_contents: list[bytes]
) -> None:
    told = ["two\nlines InputError: x", "", None, 7, np.str_("gone"), np.nan]
    for faults in (told, objects(told)):
        results = scorer({"bytes": [b"", *batch_contents[:3], None, batch_contents[3]], "fault": faults})
        assert results["fault"].tolist() == ["two lines InputError: x", None, None, None, "gone", None]
        assert np.isnan(results["score"]).tolist() == [True, False, False, False, True, False]
        assert_same(scorer({"bytes": batch_contents[:4]}), results, [1, 2, 3, 5])
    results = scorer(pa.table({"bytes": [batch_contents[0], b""], "fault": [None, told[0]]}))
    assert results["fault"].to_pylist() == [None, "two lines InputError: x"]
    assert scorer({"bytes": batch_contents[:2], "fault": pa.array([1, 2])})["fault"].tolist() == [None, None]


def test_maps_of_arrow_are_tensors_with_nan_for_faults(
    batch_checkpoint: Path, scorer: BatchScorer, batch_contents: list[bytes]
) -> None:
    mapped = BatchScorer(batch_checkpoint, dtype="float32", device="cpu", maps=True)
    batch = [batch_contents[0], b"", batch_contents[1]]
    maps = mapped({"bytes": batch})["score_map"]
    found = mapped(pa.table({"bytes": batch}))
    assert found.schema.field("score_map").type == pa.fixed_shape_tensor(pa.float32(), SIZE)
    np.testing.assert_array_equal(found["score_map"].combine_chunks().to_numpy_ndarray(), maps)
    assert np.isnan(maps).all(axis=(1, 2)).tolist() == [False, True, False]
    assert found["largest_region"].null_count == 1
    for empty in (mapped({"bytes": []}), mapped(pa.table({"bytes": pa.array([], pa.binary())}))):
        assert len(empty["score_map"]) == 0
    assert mapped({"bytes": []})["score_map"].shape == (0, *SIZE)


EMPTY_ARROW = {
    "bytes": pa.array([], pa.binary()),
    "image": pa.array([], pa.fixed_shape_tensor(pa.uint8(), (4, 4, 3))),
    "path": pa.array([], pa.string()),
}


@pytest.mark.parametrize("kind", EMPTY_ARROW)
def test_an_empty_batch_has_every_column(kind: str, scorer: BatchScorer, expected: Results) -> None:
    for column in ([], np.array([]), np.empty((0, 8, 8, 3), np.uint8)):
        results = scorer({kind: column, "other": []})
        assert set(results) >= RESULTS
        for name in RESULTS:
            assert (results[name].shape, results[name].dtype) == ((0,), expected[name].dtype)
    array = EMPTY_ARROW[kind]
    for batch in (
        {kind: array},
        pa.table({kind: array}),
        pa.table({kind: pa.chunked_array([], array.type)}),
        pa.RecordBatch.from_arrays([array], [kind]),
        pa.table({kind: pa.nulls(0)}),
    ):
        found = scorer(batch)
        assert found.num_rows == 0
        assert as_numpy(found).keys() == RESULTS
