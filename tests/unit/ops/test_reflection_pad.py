"""Padding by reflection, by the kernel against PyTorch's own: it copies, so all values are equal."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmsflow import InputError
from fastmsflow.ops.reflection_pad import reflection_pad
from fastmsflow.reference.reflection_pad import reflection_pad as twin
from tests.helpers.ops_parity import DEVICE, LAYOUTS, examples, tensor

pytestmark = pytest.mark.usefixtures("poisoned")
Padding = tuple[int, int, int, int]


def assert_copies(shape: tuple[int, ...], padding: Padding, dtype=torch.float32, layout="channels_last") -> None:
    torch.manual_seed(0)
    x = tensor(shape, dtype, layout)
    ours = reflection_pad(x, padding, "triton")
    assert torch.equal(ours, twin(x, padding))
    assert ours.dtype == dtype
    assert ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("shape", "padding"),
    [
        ((2, 8, 4, 6), (1, 1, 1, 1)),
        ((1, 3, 9, 13), (3, 3, 3, 3)),
        ((3, 5, 7, 2), (0, 1, 6, 2)),
        ((2, 1, 3, 3), (2, 0, 0, 2)),
        ((1, 130, 2, 3), (1, 1, 1, 1)),
        ((2, 260, 17, 9), (1, 1, 1, 1)),
        ((1, 4, 5, 1), (0, 0, 4, 4)),
        ((2, 6, 3, 4), (0, 0, 0, 0)),
    ],
    ids=str,
)
def test_every_pixel_is_copied_to_its_reflections(shape, padding: Padding) -> None:
    assert_copies(shape, padding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_copied_as_it_is(dtype: torch.dtype) -> None:
    assert_copies((2, 12, 5, 7), (1, 2, 2, 1), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3, 10])
def test_any_memory_layout(layout: str, channels: int) -> None:
    assert_copies((2, channels, 5, 7), (2, 1, 1, 3), layout=layout)


@examples(20)
@given(st.data(), st.integers(1, 12), st.integers(1, 12), st.integers(1, 9))
def test_any_grid_and_padding(data, height: int, width: int, channels: int) -> None:
    sides = [data.draw(st.integers(0, size - 1)) for size in (width, width, height, height)]
    assert_copies((2, channels, height, width), (sides[0], sides[1], sides[2], sides[3]))


def test_nan_and_inf_are_copied_too() -> None:
    x = tensor((1, 3, 4, 5), torch.float32)
    x[0, 0, 1, 1], x[0, 1, 2, 3] = float("nan"), float("inf")
    ours, theirs = reflection_pad(x, (1, 1, 1, 1), "triton"), twin(x, (1, 1, 1, 1))
    assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("shape", "padding", "says"),
    [
        ((3, 4, 5), (1, 1, 1, 1), r"x is \(3, 4, 5\); give \(B, C, H, W\)"),
        ((1, 3, 4, 5), (5, 0, 0, 0), "4x5 pixels cannot be padded by"),
        ((1, 3, 4, 5), (0, 0, 0, 4), "4x5 pixels cannot be padded by"),
        ((1, 3, 4, 5), (0, -1, 0, 0), "give at least 0"),
    ],
)
def test_what_cannot_be_reflected_is_refused(backend, shape, padding: Padding, says: str) -> None:
    with pytest.raises(InputError, match=says):
        reflection_pad(torch.zeros(shape, device=DEVICE), padding, backend)
