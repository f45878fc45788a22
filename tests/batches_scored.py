"""A model, images of several sizes and a scorer, for the tests of scoring batches; and what results must be."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastmsflow import MSFlow
from fastmsflow.calibration import Calibration
from fastmsflow.data import load_image
from fastmsflow.inference import BatchScorer

SIZE = (32, 48)
"""(H, W) of the model."""
SIZES = [(40, 36), (32, 48), (36, 40), (64, 32)]
"""(H, W) of the images, in turn."""
IMAGES = 12
SCORES = ("score", "log_score", "absolute_score")
BOX = ("largest_region_left", "largest_region_top", "largest_region_right", "largest_region_bottom")
RESULTS = {*SCORES, "defective", "largest_region", *BOX, "fault"}


@pytest.fixture(scope="module")
def arrays() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (*SIZES[i % 4], 3), np.uint8) for i in range(IMAGES)]


@pytest.fixture(scope="module")
def images(arrays: list[np.ndarray], tmp_path_factory) -> list[Path]:
    """00.png to 11.png."""
    folder = tmp_path_factory.mktemp("images")
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{i:02}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def contents(images: list[Path]) -> list[bytes]:
    return [path.read_bytes() for path in images]


@pytest.fixture(scope="module")
def network(images: list[Path]) -> MSFlow:
    """Untrained, and calibrated so that half of the images are defective, and some have regions, others none."""
    torch.manual_seed(0)
    model = MSFlow("test_efficientnet", pretrained=False, image_size=SIZE, blocks=(1, 1, 1)).eval()
    with torch.no_grad():
        scores = model.scores(torch.stack([load_image(path, SIZE) for path in images]))
    middle = float(scores.absolute_score.median())
    peaks, pixels = scores.absolute_map.flatten(1).amax(dim=1), scores.absolute_map.flatten()
    model.calibration = Calibration((middle,) * 20, (float(peaks.sort().values[3]),) * 20, float(pixels.median()))
    return model


@pytest.fixture(scope="module")
def model(network: MSFlow, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "calibrated.safetensors"
    network.save(path)
    return path


@pytest.fixture(scope="module")
def scorer(model: Path) -> BatchScorer:
    return BatchScorer(model, dtype="float32", device="cpu").load()


@pytest.fixture(scope="module")
def expected(scorer: BatchScorer, contents: list[bytes]) -> dict[str, Any]:
    return scorer({"bytes": contents})


def assert_same(results: Mapping[str, Any], expected: Mapping[str, Any], rows: Any = slice(None)) -> None:
    """To the bit, in every column of results; NaN is as NaN."""
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
    """Of an Arrow table, whose boxes are float32."""
    boxes = {name: column.astype(np.float32) for name, column in expected.items() if name.startswith("largest_region_")}
    assert_same(as_numpy(results), {**expected, **boxes})


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()
