"""The coupling kernels against their twins in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_parity import DEVICE, LAYOUTS, assert_not_finite_alike, assert_twins, examples, tensor
from tolerances import OPERATION_CLOSE

from fastmsflow import InputError
from fastmsflow.ops import coupling as ops
from fastmsflow.reference import coupling as reference

SHAPES = [(2, 16, 8, 8), (1, 24, 12, 20), (3, 40, 6, 10), (2, 112, 3, 5), (1, 2, 1, 1), (2, 130, 1, 7)]
JOINING = ["joining_cross_coupling", "joining_cross_coupling_likelihood"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("poisoned")


def block(shape, dtype=torch.float32, layout="channels_last") -> list:
    torch.manual_seed(0)
    c = shape[1]
    global_scale = reference.initial_global_scale() + torch.randn(c, device=DEVICE)
    return [
        tensor(shape, dtype, layout),
        tensor(shape, dtype, layout, scale=8.0),
        global_scale,
        torch.randn(c, device=DEVICE),
        torch.randperm(c).to(DEVICE),
    ]


def cross(shape, dtype=torch.float32, layout="channels_last") -> list:
    torch.manual_seed(0)
    b, c, h, w = shape
    return [tensor((b, c // 2, h, w), dtype, layout), tensor(shape, dtype, layout, scale=3.0)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", ["tanh", "scaled_tanh"])
@pytest.mark.parametrize("name", ["coupling", "coupling_inverse"])
def test_block_equals_float64(name: str, form: str, shape) -> None:
    assert_twins(getattr(ops, name), getattr(reference, name), [*block(shape), 1.9, form])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["cross_coupling", "cross_coupling_inverse"])
def test_cross_coupling_equals_float64(name: str, shape) -> None:
    assert_twins(getattr(ops, name), getattr(reference, name), [*cross(shape), 1.9])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", JOINING)
def test_joining_cross_coupling_equals_float64(name: str, shape) -> None:
    x, raw = cross(shape)
    assert_twins(getattr(ops, name), getattr(reference, name), [x.flip(1), x, raw, 1.9])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["coupling", "coupling_inverse"])
def test_half_precision_rounds_only_what_is_stored(name: str, dtype: torch.dtype) -> None:
    assert_twins(getattr(ops, name), getattr(reference, name), [*block((2, 24, 6, 10), dtype), 1.9, "tanh"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["coupling", "coupling_inverse"])
def test_any_memory_layout(name: str, layout: str) -> None:
    arguments = [*block((2, 24, 6, 10), layout=layout), 1.9, "tanh"]
    assert_twins(getattr(ops, name), getattr(reference, name), arguments)


def test_mixed_precision_of_autocast() -> None:
    x, raw, *fixed = block((2, 24, 6, 10))
    z, _ = ops.coupling(x, raw.bfloat16(), *fixed, 1.9, "tanh", backend="triton")
    truth, _ = reference.coupling(x.double(), raw.bfloat16().double(), *fixed, 1.9, "tanh")
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.double(), truth, **OPERATION_CLOSE)


def test_output_is_bounded_to_a_million_and_passes_no_gradient_there() -> None:
    x, raw = cross((1, 16, 3, 5))
    x[:, ::2] *= 1e7
    for name in JOINING:
        assert_twins(getattr(ops, name), getattr(reference, name), [x.flip(1), x, raw, 1.9])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("place", [0, 1], ids=["x", "raw"])
@pytest.mark.parametrize("name", ["coupling", "coupling_inverse"])
def test_nan_and_inf_come_out_where_the_reference_has_them(name: str, place: int, bad: float) -> None:
    arguments = block((2, 24, 3, 5))
    arguments[place][1, 3, 2, 4] = arguments[place][0, 20, 0, 1] = bad
    ours, log_det = getattr(ops, name)(*arguments, 1.9, "tanh", backend="triton")
    theirs, log_det_theirs = getattr(reference, name)(*arguments, 1.9, "tanh")
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.isinf(), theirs.isinf())
    assert torch.equal(log_det.isnan(), log_det_theirs.isnan())
    kept, raw = cross((2, 24, 3, 5))
    kept[0, 1, 1, 1] = bad
    for joining in JOINING:
        assert_not_finite_alike(getattr(ops, joining), getattr(reference, joining), [kept, kept, raw, 1.9])


@examples(25)
@given(
    batch=st.integers(1, 4),
    half=st.integers(1, 70),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_any_shape_equals_float64(batch: int, half: int, height: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    assert_twins(ops.coupling, reference.coupling, [*block((batch, 2 * half, height, width)), 1.9, "tanh"])


@pytest.mark.parametrize(
    ("x", "raw", "message"),
    [
        ((2, 8, 3, 5), (2, 8, 3, 4), "a grid"),
        ((2, 8, 3, 5), (1, 8, 3, 5), "a batch of 1"),
        ((2, 8, 3, 5), (2, 7, 3, 5), "7 channels"),
        ((2, 8, 3, 5), (2, 18, 3, 5), "18 channels"),
    ],
)
def test_what_does_not_fit_is_refused(x, raw, message: str) -> None:
    fixed = block((1, 8, 3, 5))[2:]
    with pytest.raises(InputError, match=message):
        ops.coupling(*(torch.zeros(shape, device=DEVICE) for shape in (x, raw)), *fixed, 1.9, "tanh", backend="torch")
