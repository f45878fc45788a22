"""The ranges of numbers that Python's arguments take, and what is no number of a range."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastmsflow import InputError, MSFlow, MSFlowDetector, MultiScaleFlow
from fastmsflow.calibration import DecisionThreshold
from fastmsflow.data import ShardedImages, write_shards
from fastmsflow.data.image_batches import BatchReader, read_batches
from fastmsflow.data.reader_pool import ReaderPool
from fastmsflow.inference import BatchScorer
from fastmsflow.inference.predictor import Predictor
from fastmsflow.metrics import aupro
from fastmsflow.number_range import COUNT, FINITE, NumberRange, above, between, whole
from fastmsflow.scoring import anomaly_scores
from tests.helpers.tiny_model import tiny_model

NO_NUMBERS = (math.nan, math.inf, -math.inf, True, "1", None, 1 + 0j, np.bool_(True))


@pytest.mark.parametrize(
    ("numbers", "inside", "outside", "text"),
    [
        (whole(0, 4), (0, 4, np.int64(2)), (-1, 5, 2.0, 10**400, *NO_NUMBERS), "0 to 4"),
        (whole(1), (1, 2**31 - 1), (0, 2**31, *NO_NUMBERS), "1 or more"),
        (between(0, 0.5), (0, 0.5, np.float32(0.25)), (-1e-9, 0.6, *NO_NUMBERS), "0 to 0.5"),
        (above(0), (1e-300, 1, 1e300), (0, -0.0, -1, 10**400, *NO_NUMBERS), "above 0"),
        (above(0, 1), (0.5,), (0, 1, *NO_NUMBERS), "above 0, below 1"),
        (NumberRange(0, 1, open_low=True), (1,), (0, 1.1, *NO_NUMBERS), "above 0, at most 1"),
        (NumberRange(), (-1e300, 0, 5), NO_NUMBERS, "finite"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_range_takes_its_own_numbers_alone(
    numbers: NumberRange, inside: tuple[Any, ...], outside: tuple[Any, ...], text: str
) -> None:
    for number in inside:
        numbers.check("x", number)
    for number in outside:
        with pytest.raises(InputError, match=r"^x is .*; it must be ") as raised:
            numbers.check("x", number)
        end = str(raised.value)
        assert end.endswith((text, f"{text}, and finite", "at most 2147483647")) and len(str(raised.value)) < 100


def flow(**options: Any) -> MultiScaleFlow:
    return MultiScaleFlow(**{"channels": (4, 4, 4), "condition_channels": (4, 4, 4), "blocks": (1, 1, 1), **options})


def scores(top_k: float) -> object:
    return anomaly_scores([torch.zeros(1, 2, 4, 4)] * 3, (32, 32), top_k)


def area(fpr_limit: float) -> object:
    masks = np.zeros((1, 4, 4), bool)
    masks[0, 0, 0] = True
    return aupro(masks, masks.astype(np.float32), fpr_limit)


def fit(**options: Any) -> object:
    detector = MSFlowDetector("test_resnet.r160_in1k", **options)
    return detector.fit(np.zeros((2, 32, 32), np.uint8))


SIZES = ((0, 64), (64, 31), (64.5, 64), (True, 64), (math.nan, 64), (10**9, 64), 64, (64,), (64, 64, 64), "64")
CALLS = [
    *((lambda size=size: tiny_model(image_size=size), "image_size") for size in SIZES),
    *((lambda n=n: flow(blocks=(1, 1, n)), "blocks") for n in (0, -1, 1.5, True, 10**9 * 10)),
    *((lambda n=n: flow(clamp=n), "clamp") for n in (0, -1.9, math.nan, math.inf)),
    (lambda: flow(channels=(4, 4, 4.0)), "channels"),
    *((lambda n=n: scores(n), "top_k") for n in (-0.1, 1.1, math.nan, math.inf)),
    *((lambda n=n: area(n), "fpr_limit") for n in (0, 1.1, math.nan, -math.inf, True)),
    *((lambda n=n: DecisionThreshold(n, ""), "threshold") for n in (math.nan, math.inf, True)),
    *((lambda n=n: DecisionThreshold.from_calibration(None, None, n), "threshold") for n in (math.nan, True)),
    *((lambda n=n: BatchScorer("model", threshold=n), "threshold") for n in (math.nan, True)),
    *((lambda n=n: BatchScorer("model", false_alarms=n), "false_alarms") for n in (0, 0.0, 1, math.nan, True)),
    *((lambda n=n: ReaderPool(n), "workers") for n in (-1, 1.0, True, 10**6)),
    *((lambda n=n: list(read_batches([], 9, BatchReader((32, 32)), n)), "workers") for n in (-1, True)),
    *((lambda n=n: write_shards(["a.png"], "out", n), "images_per_shard") for n in (0, -1, 2.5, True, math.nan)),
    *((lambda n=n: ShardedImages("none", (32, 32), buffer=n), "buffer") for n in (0, 1.5)),
    *((lambda n=n: ShardedImages("none", (32, 32), workers=n), "workers") for n in (-1, True)),
    *((lambda n=n: fit(epochs=n), "epochs") for n in (0, 1.5, True)),
    *((lambda n=n: fit(contamination=n), "contamination") for n in (0, 0.5, math.nan)),
    *((lambda n=n: fit(random_state=n), "random_state") for n in (-1, 1.5, "a")),
    *((lambda n=n: fit(image_size=n), "image_size") for n in (0, 31, 64.0)),
]


@pytest.mark.parametrize(("call", "name"), CALLS, ids=[f"{name} {i}" for i, (_, name) in enumerate(CALLS)])
def test_an_argument_out_of_its_range_is_named(call: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=rf"^{name}\b.* is ") as raised:
        call()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_a_predictor_refuses_a_batch_before_it_writes(size: Any, tmp_path: Path) -> None:
    model: MSFlow = tiny_model()
    with pytest.raises(InputError, match=r"^batch_size is "):
        Predictor(model, tmp_path / "out", batch_size=size)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("numbers", "value", "message"),
    [
        (COUNT, 10**20, "x is 100000000000000000000; it must be a whole number, at most 2147483647"),
        (COUNT, 0, "x is 0; it must be a whole number, 1 or more"),
        (above(0), float("inf"), "x is inf; it must be above 0, and finite"),
        (FINITE, float("inf"), "x is inf; it must be finite"),
    ],
)
def test_the_message_contradicts_no_number_that_it_names(numbers: NumberRange, value: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        numbers.check("x", value)
    assert str(caught.value) == message


def test_a_clamp_that_no_checkpoint_holds_is_refused_before_there_is_a_model() -> None:
    for clamp in (1e7, 1e-7):
        with pytest.raises(InputError, match=f"clamp is {clamp}; it must be from 0.000001 to 1000000"):
            MultiScaleFlow((8, 8, 8), (16, 16, 16), (1, 1, 1), clamp)
