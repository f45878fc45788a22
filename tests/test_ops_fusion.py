"""Pool and upsample between the levels by the kernels, against their twins in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_parity import LAYOUTS, assert_not_finite_alike, assert_twins, examples, tensor

from fastmsflow import InputError
from fastmsflow.ops import fusion as ops
from fastmsflow.reference import fusion as reference

LEVELS = [
    [(2, 8, 8, 8), (2, 16, 4, 4), (2, 32, 2, 2)],
    [(3, 12, 12, 20), (3, 20, 6, 10), (3, 56, 3, 5)],
    [(1, 4, 7, 11), (1, 6, 5, 3), (1, 2, 3, 2)],
    [(2, 3, 9, 1), (2, 5, 1, 1)],
    [(1, 130, 2, 3), (1, 2, 4, 7)],
]
pytestmark = pytest.mark.usefixtures("poisoned")
each_pyramid = pytest.mark.parametrize("shapes", LEVELS, ids=str)


def pool(*maps, backend):
    return ops.pool_and_concat(maps, backend)


def upsample(joint, *maps, backend):
    return ops.split_and_upsample(joint, maps, backend)


def pool_twin(*maps):
    return reference.pool_and_concat(maps)


def upsample_twin(joint, *maps):
    return reference.split_and_upsample(joint, maps)


def levels(shapes, dtype=torch.float32, layout="channels_last") -> list:
    torch.manual_seed(0)
    return [tensor(shape, dtype, layout) for shape in shapes]


def with_joint(shapes, dtype=torch.float32, layout="channels_last") -> list:
    b, _, h, w = shapes[-1]
    return [*levels([(b, sum(shape[1] for shape in shapes), h, w), *shapes], dtype, layout)]


@each_pyramid
def test_pool_equals_float64(shapes) -> None:
    assert_twins(pool, pool_twin, levels(shapes))


@each_pyramid
def test_upsample_equals_float64(shapes) -> None:
    assert_twins(upsample, upsample_twin, with_joint(shapes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_only_what_is_stored(dtype: torch.dtype) -> None:
    assert_twins(pool, pool_twin, levels(LEVELS[1], dtype))
    assert_twins(upsample, upsample_twin, with_joint(LEVELS[1], dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(layout: str) -> None:
    assert_twins(pool, pool_twin, levels(LEVELS[1], layout=layout))
    assert_twins(upsample, upsample_twin, with_joint(LEVELS[1], layout=layout))


@examples(12)
@given(st.integers(1, 25), st.integers(1, 25), st.integers(1, 9), st.integers(1, 9))
def test_any_grid_equals_float64(height: int, width: int, h: int, w: int) -> None:
    shapes = [(1, 3, height, width), (1, 2, h, w)]
    assert_twins(pool, pool_twin, levels(shapes))
    assert_twins(upsample, upsample_twin, with_joint(shapes))


def test_nan_reaches_what_it_reaches_in_the_reference() -> None:
    joint, *maps = with_joint(LEVELS[1])
    joint[1, 3, 1, 2] = maps[0][0, 1, 5, 7] = float("nan")
    assert_not_finite_alike(pool, pool_twin, maps)
    assert_not_finite_alike(upsample, upsample_twin, [joint, *maps])


def test_what_does_not_fit_is_refused() -> None:
    joint, *maps = with_joint(LEVELS[1])
    with pytest.raises(InputError, match="joint has 87 channels"):
        ops.split_and_upsample(joint[:, 1:], maps, "torch")
