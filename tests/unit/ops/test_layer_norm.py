"""LayerNorm + ReLU by the kernels against its twin in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmsflow import InputError
from fastmsflow.ops.layer_norm import layer_norm_relu
from fastmsflow.reference import layer_norm as reference
from tests.helpers.ops_parity import DEVICE, LAYOUTS, assert_not_finite_alike, assert_twins, examples, tensor

SHAPES = [(2, 192, 8, 8), (1, 88, 12, 20), (3, 120, 3, 5), (2, 576, 2, 3), (1, 1, 1, 1), (1, 3, 33, 1)]
pytestmark = pytest.mark.usefixtures("poisoned")


def arguments(shape, dtype=torch.float32, layout="channels_last", condition: bool = True) -> list:
    torch.manual_seed(0)
    c = shape[1]
    weight, bias = (torch.randn(c, device=DEVICE) for _ in range(2))
    return [tensor(shape, dtype, layout), weight, bias, *([tensor((1, *shape[1:]), dtype)] if condition else [])]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("condition", [True, False], ids=["condition", "plain"])
def test_equals_float64(shape, condition: bool) -> None:
    assert_twins(layer_norm_relu, reference.layer_norm_relu, arguments(shape, condition=condition))


def test_a_bias_is_added_to_every_row() -> None:
    *given, condition = arguments((3, 24, 6, 10))
    assert_twins(layer_norm_relu, reference.layer_norm_relu, [*given, condition[:, :, :1, :1].clone()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_only_what_is_stored(dtype: torch.dtype) -> None:
    assert_twins(layer_norm_relu, reference.layer_norm_relu, arguments((2, 88, 6, 10), dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(layout: str) -> None:
    assert_twins(layer_norm_relu, reference.layer_norm_relu, arguments((2, 24, 6, 10), layout=layout))


def test_a_large_mean_does_not_drown_the_variance() -> None:
    x, *rest = arguments((2, 64, 3, 5))
    assert_twins(layer_norm_relu, reference.layer_norm_relu, [x + 64, *rest])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_nan_and_inf_come_out_where_the_reference_has_them(bad: float) -> None:
    x, *rest = arguments((2, 24, 3, 5))
    x[1, 3, 2, 4] = bad
    assert_not_finite_alike(layer_norm_relu, reference.layer_norm_relu, [x, *rest])


@pytest.mark.slow
@examples(12)
# With a handful of channels 1 / std can be huge, and what gradients it multiplies cancels.
@given(st.integers(1, 3), st.integers(8, 300), st.integers(1, 9), st.integers(1, 9))
def test_any_shape_equals_float64(batch: int, channels: int, height: int, width: int) -> None:
    assert_twins(layer_norm_relu, reference.layer_norm_relu, arguments((batch, channels, height, width)))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 8, 3, 5), (7,), (7,), (1, 8, 3, 5)), "weight"),
        (((2, 8, 3, 5), (8,), (8,), (2, 8, 3, 5)), "one map for all"),
        (((2, 8, 3, 5), (8,), (8,), (1, 8, 3, 4)), "one map for all"),
    ],
)
def test_what_does_not_fit_is_refused(shapes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        layer_norm_relu(*map(torch.zeros, shapes), backend="torch")
