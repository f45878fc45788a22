"""Rows and batches that cannot be scored: a fault in the row between good ones, or one line."""

import struct
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastmsflow import InputError
from fastmsflow.inference import BatchScorer
from tests.helpers.batches import SCORES, as_numpy, assert_as_expected, assert_same, objects
from tests.helpers.web_servers import send, web_server

pa = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'fastmsflow[shards]'")

arrow = pytest.importorskip("fastmsflow.inference.arrow")


def bomb() -> bytes:
    """A PNG that says it is 60000x60000."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


class Raises:
    def __array__(self, *args: object, **options: object) -> np.ndarray:
        raise RuntimeError("two\nlines")


SHAPE = "give (H, W) or (H, W, 3) of uint8"
BAD: dict[str, dict[Any, str]] = {
    "bytes": {
        "cut off": "damaged or truncated",
        bomb(): "too large to decode (more than 179 megapixels); scale it down or cut it into tiles",
        b"": "not an image that can be read",
        b"GIF89a": "not an image that can be read",
        "path.png": "the column bytes holds a value of type str; give files' bytes",
        7: "the column bytes holds a value of type int; give files' bytes",
        None: "the column bytes is empty here",
        float("nan"): "the column bytes is empty here",
        (1, 2): "the column bytes holds a value of type tuple; give files' bytes",
    },
    "path": {
        b"a.png": "the column path holds a value of type bytes; give paths or URLs as text",
        7: "the column path holds a value of type int; give paths or URLs as text",
        1.5: "the column path holds a value of type float; give paths or URLs as text",
        None: "the column path is empty here",
        "": "the column path is empty here",
    },
    "image": {
        "a.png": SHAPE,
        b"a.png": "the column image holds files' bytes; rename it to bytes",
        7: SHAPE,
        (1, 2): SHAPE,
        ((1, 2), (3,)): "the column image holds no array",
        Raises(): "the column image holds no array (two lines)",
        None: "the column image is empty here",
    },
}
BAD_ARRAYS: list[tuple[Any, str]] = [
    ({"bytes": b"", "path": ""}, "holds fields (bytes, path); give the one of files' bytes as the column bytes"),
    (np.zeros((3, 40, 40), np.uint8), f"uint8 of shape (3, 40, 40); {SHAPE}: x.transpose(1, 2, 0)"),
    (np.zeros((40, 40, 2), np.uint8), SHAPE),
    (np.zeros((2, 40, 40, 3), np.uint8), SHAPE),
    (np.zeros((40, 40, 3), np.int64), SHAPE),
    (np.zeros((40, 40, 3), bool), SHAPE),
    (np.zeros((40, 40, 3), np.uint16), SHAPE),
    (np.zeros((40, 40, 3), complex), SHAPE),
    (np.full((40, 40, 3), "x"), SHAPE),
    (np.full((40, 40, 3), None), SHAPE),
    (np.zeros((0, 0, 3), np.uint8), "less than the extractor's stride of 32"),
    (np.zeros((0, 40), np.uint8), "less than the extractor's stride of 32"),
    (np.zeros((31, 40, 3), np.uint8), "40x31 pixels, less than the extractor's stride of 32"),
    (np.zeros((0, 0, 3)), "give (H, W, 3), at least 32 pixels on a side"),
    (np.zeros((3, 40, 40)), "float64 of shape (3, 40, 40); give (H, W, 3)"),
    (np.zeros((40, 40)), "float64 of shape (40, 40); give (H, W, 3)"),
    (np.zeros((40, 40, 4)), "float64 of shape (40, 40, 4); give (H, W, 3)"),
    (np.float64(0.5), "float64 of shape (); give (H, W, 3)"),
    (np.full((40, 40, 3), np.nan), "floating-point pixels from nan to nan; give [0, 1]"),
    (np.full((40, 40, 3), np.inf), "floating-point pixels from inf to inf; give [0, 1]"),
    (np.full((40, 40, 3), 255.0), "floating-point pixels from 255 to 255; give [0, 1]"),
    (np.full((40, 40, 3), -0.1), "floating-point pixels from -0.1 to -0.1; give [0, 1]"),
    (Image.new("P", (40, 40)), "the column image holds a value of type Image; give np.asarray(image.convert('RGB'))"),
    (torch.zeros(40, 40, 3, requires_grad=True), "the column image holds no array"),
]


@pytest.mark.parametrize("kind", BAD)
def test_bad_rows_are_faults_between_good_ones(
    kind: str,
    scorer: BatchScorer,
    batch_arrays: list[np.ndarray],
    batch_contents: list[bytes],
    batch_images: list[Path],
) -> None:
    good = {"bytes": batch_contents, "image": batch_arrays, "path": [str(path) for path in batch_images]}[kind]
    bad = [(batch_contents[0][:-200] if value == "cut off" else value, line) for value, line in BAD[kind].items()]
    bad += BAD_ARRAYS if kind == "image" else []
    rows = [good[0], *(value for value, _ in bad), good[1]]
    results = scorer({kind: objects(rows)})
    # In the same places, since a score's last bits hang on its neighbors in the batch.
    alone = scorer({kind: objects([good[0], *[None] * len(bad), good[1]])})
    assert_same({name: np.asarray(alone[name])[[0, -1]] for name in alone}, results, [0, -1])
    for row, (_, line) in enumerate(bad, 1):
        fault = results["fault"][row]
        assert "\n" not in fault
        assert line in fault
        assert str(rows[row]) in fault or f"row {row}" in fault
        assert all(np.isnan(results[name][row]) for name in SCORES)
        assert results["defective"][row] is None


@pytest.mark.parametrize("kind", ["bytes", "image", "path"])
@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, None]),
        pa.array([1.5, 2.5]),
        pa.array([True, False]),
        pa.array([[1, 2], None]),
        pa.array([["a"], []]),
        pa.array([[[1, None], [2, 3]], [[1], [2, 3]]]),
        pa.array([[[]], [[], []]], pa.list_(pa.list_(pa.uint8()))),
        pa.array([{"bytes": b"x"}, None]),
        pa.array([None, None]),
        pa.array([0, 1], pa.timestamp("s")),
        pa.array(["a", "b"]),
        pa.array([b"a", b"b"]),
        pa.array([b"ab", b"cd"], pa.binary(2)),
    ],
    ids=lambda column: str(column.type),
)
def test_arrow_columns_of_every_type_are_scored_or_faults(kind: str, column: Any, scorer: BatchScorer) -> None:
    results = as_numpy(scorer(pa.table({kind: column, "number": [0, 1]})))
    for fault in results["fault"]:
        assert isinstance(fault, str)
        assert "\n" not in fault


@pytest.mark.parametrize(
    ("batch", "line"),
    [
        ({}, "the batch has columns (none); one of bytes, image and path must hold the images: rename it"),
        ({"img": [], 7: []}, "the batch has columns img, 7; one of bytes, image and path must hold the images"),
        (pa.table({"img": [1]}), "the batch has columns img; one of bytes, image and path must hold the images"),
        (pa.table({}), "the batch has columns (none); one of bytes, image and path must hold the images"),
        ({"bytes": [b""], "id": [1, 2]}, "the batch's columns differ in their number of rows (bytes 1, id 2)"),
        ({"path": pa.array(["a"]), "id": pa.array([1, 2])}, "the batch's columns differ in their number of rows"),
        (
            {"path": "a.png"},
            "the batch's column path is a value of type str; give an array or a list, a value for each row",
        ),
        ({"bytes": b"content"}, "the batch's column bytes is a value of type bytes; give an array or a list"),
        ({"image": None}, "the batch's column image is a value of type NoneType; give an array or a list"),
        ({"image": np.array(1)}, "the batch's column image is an array of int64; give an array or a list"),
        (["a.png"], "the batch is a list; give a dict of columns, or an Arrow table"),
        (None, "the batch is a NoneType; give a dict of columns, or an Arrow table"),
        ("a.png", "the batch is a str; give a dict of columns, or an Arrow table"),
    ],
    ids=lambda given: given if isinstance(given, str) else type(given).__name__,
)
def test_what_is_no_batch_is_told_in_one_line(batch: Any, line: str, scorer: BatchScorer) -> None:
    with pytest.raises(InputError) as refused:
        scorer(batch)
    assert str(refused.value).startswith(line)
    assert "\n" not in str(refused.value)


def test_pandas_frames_are_refused_and_their_columns_read_by_place(
    scorer: BatchScorer, batch_contents: list[bytes]
) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"bytes": batch_contents[:3]}, index=[2, 0, 1])
    with pytest.raises(InputError, match=r"^the batch is a DataFrame; give a dict of columns, or an Arrow table$"):
        scorer(frame)
    assert_same(scorer({"bytes": frame["bytes"]}), scorer({"bytes": batch_contents[:3]}))
    assert_as_expected(scorer(pa.Table.from_pandas(frame)), scorer({"bytes": batch_contents[:3]}))


def test_columns_that_share_a_name_are_kept_or_dropped_together(
    scorer: BatchScorer, batch_contents: list[bytes]
) -> None:
    table = pa.table([pa.array([1]), pa.array([2]), pa.array(batch_contents[:1])], ["a", "a", "bytes"])
    assert scorer(table).column_names == ["a", "a", *arrow.RESULTS.names]
    twice = pa.table([pa.array(batch_contents[:1]), pa.array(batch_contents[1:2])], ["bytes", "bytes"])
    found = scorer(twice)
    assert found.column_names == arrow.RESULTS.names
    assert found["score"].to_pylist() == scorer({"bytes": batch_contents[1:2]})["score"].tolist()


def test_a_url_that_a_server_refuses_is_a_fault_between_good_ones(
    scorer: BatchScorer, batch_contents: list[bytes]
) -> None:
    pytest.importorskip("aiohttp", reason="needs aiohttp")

    def answer(request: Any) -> None:
        if request.path == "/500":
            send(request, b"", 500)
        else:
            send(request, batch_contents[int(request.path[1:])])

    with web_server(answer) as server:
        results = scorer({"path": [f"{server}/{path}" for path in (0, 500, 1)]})
    assert_same(scorer({"bytes": batch_contents[:2]}), results, [0, -1])
    assert results["fault"][1].startswith(f"{server}/500: the server answers with status 500")


def test_urls_that_do_not_answer_are_faults_and_wait_side_by_side(
    scorer: BatchScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp", reason="needs aiohttp")
    monkeypatch.setattr("fastmsflow.data.url_images.TIMEOUT", 2.0)
    urls, ended = 8, threading.Event()
    begin = time.monotonic()
    with web_server(lambda request: ended.wait(60)) as server:
        results = scorer({"path": [f"{server}/{i}" for i in range(urls)]})
        ended.set()
    assert time.monotonic() - begin < urls * 2
    assert [fault.partition(": ")[2][:26] for fault in results["fault"]] == ["no answer within 2 s; look"] * urls
