"""Pool and upsample between the levels by the kernels, against their twins in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmsflow import InputError
from fastmsflow.kernels import configs
from fastmsflow.ops import fusion as ops
from fastmsflow.reference import fusion as reference
from tests.helpers.ops_parity import DEVICE, LAYOUTS, assert_not_finite_alike, assert_twins, examples, tensor

LEVELS = [
    [(2, 8, 8, 8), (2, 16, 4, 4), (2, 32, 2, 2)],
    [(3, 12, 12, 20), (3, 20, 6, 10), (3, 56, 3, 5)],
    [(1, 4, 7, 11), (1, 6, 5, 3), (1, 2, 3, 2)],
    [(2, 3, 9, 1), (2, 5, 1, 1)],
    [(1, 130, 2, 3), (1, 2, 4, 7)],
    # Blocks of a transformer have one grid.
    [(2, 6, 5, 7), (2, 6, 5, 7), (2, 6, 5, 7)],
]
pytestmark = pytest.mark.usefixtures("poisoned")
each_pyramid = pytest.mark.parametrize("shapes", LEVELS, ids=str)


def pool(*maps, backend):
    return ops.pool_and_concat(maps, backend)


def upsample(joint, bias, *maps, backend):
    return ops.split_and_upsample(joint, bias, maps, backend)


def pool_twin(*maps):
    return reference.pool_and_concat(maps)


def upsample_twin(joint, bias, *maps):
    return reference.split_and_upsample(joint, bias, maps)


def levels(shapes, dtype=torch.float32, layout="channels_last") -> list:
    torch.manual_seed(0)
    return [tensor(shape, dtype, layout) for shape in shapes]


def with_joint(shapes, dtype=torch.float32, layout="channels_last") -> list:
    b, _, h, w = shapes[-1]
    channels = sum(shape[1] for shape in shapes)
    joint, *maps = levels([(b, channels, h, w), *shapes], dtype, layout)
    return [joint, torch.randn(channels, device=DEVICE), *maps]


def test_without_a_bias_relu_is_all_that_comes_before() -> None:
    joint, _, *maps = with_joint(LEVELS[1])
    assert_twins(
        lambda joint, *maps, backend: ops.split_and_upsample(joint, None, maps, backend),
        lambda joint, *maps: reference.split_and_upsample(joint, None, maps),
        [joint, *maps],
    )


@pytest.mark.slow
@pytest.mark.parametrize("own", [True, False], ids=["own convolution", "vendor's"])
def test_behind_its_convolution_equals_float64(monkeypatch: pytest.MonkeyPatch, own: bool) -> None:
    monkeypatch.setattr(configs, "own_convolution_is_faster", lambda *_: own)
    joint, bias, *maps = with_joint(LEVELS[1])
    weight = torch.randn(88, 88, 3, 3, device=DEVICE) / 28
    assert_twins(
        lambda hidden, weight, bias, *maps, backend: ops.conv3x3_split_and_upsample(
            hidden, weight, bias, maps, backend=backend
        ),
        lambda hidden, weight, bias, *maps: reference.conv3x3_split_and_upsample(hidden, weight, bias, maps),
        [joint, weight, bias, *maps],
    )


@each_pyramid
def test_pool_equals_float64(shapes) -> None:
    assert_twins(pool, pool_twin, levels(shapes))


@each_pyramid
def test_upsample_equals_float64(shapes) -> None:
    assert_twins(upsample, upsample_twin, with_joint(shapes))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_only_what_is_stored(dtype: torch.dtype) -> None:
    assert_twins(pool, pool_twin, levels(LEVELS[1], dtype))
    assert_twins(upsample, upsample_twin, with_joint(LEVELS[1], dtype))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(layout: str) -> None:
    assert_twins(pool, pool_twin, levels(LEVELS[1], layout=layout))
    assert_twins(upsample, upsample_twin, with_joint(LEVELS[1], layout=layout))


@pytest.mark.slow
@examples(12)
@given(st.integers(1, 25), st.integers(1, 25), st.integers(1, 9), st.integers(1, 9))
def test_any_grid_equals_float64(height: int, width: int, h: int, w: int) -> None:
    shapes = [(1, 3, height, width), (1, 2, h, w)]
    assert_twins(pool, pool_twin, levels(shapes))
    assert_twins(upsample, upsample_twin, with_joint(shapes))


def test_nan_reaches_what_it_reaches_in_the_reference() -> None:
    joint, bias, *maps = with_joint(LEVELS[1])
    joint[1, 3, 1, 2] = maps[0][0, 1, 5, 7] = float("nan")
    assert_not_finite_alike(pool, pool_twin, maps)
    assert_not_finite_alike(upsample, upsample_twin, [joint, bias, *maps])


def test_what_does_not_fit_is_refused() -> None:
    joint, bias, *maps = with_joint(LEVELS[1])
    with pytest.raises(InputError, match="joint has 87 channels"):
        ops.split_and_upsample(joint[:, 1:], bias, maps, "torch")
