"""Adam on weights in channels-last memory: PyTorch's own result, without its copies."""

import pytest
import torch
from torch import nn

from fastmsflow.training.optimizer import Adam
from tests.helpers.recorded_calls import recorded_calls
from tests.helpers.tolerances import SAME_SUMS

LAYOUTS = [torch.channels_last, torch.contiguous_format]


def trained(kind, weight_layout, grad_layout, **options) -> list[torch.Tensor]:
    """Returns a weight, a bias and the weight's two states after three steps of an optimizer of ``kind``."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 5, 3, 3), (8,)]
    weight, bias = (nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes)
    weight.data = weight.data.contiguous(memory_format=weight_layout)
    optimizer = kind([weight, bias], lr=0.1, **options)
    for _ in range(3):
        grad, bias.grad = (torch.randn(shape, generator=generator) for shape in shapes)
        weight.grad = grad.contiguous(memory_format=grad_layout)
        optimizer.step()
    state = optimizer.state[weight]
    return [weight.detach(), bias.detach(), state["exp_avg"], state["exp_avg_sq"]]


@pytest.mark.parametrize("grad_layout", LAYOUTS)
def test_steps_are_those_of_plain_adam_in_any_layout_of_the_gradient(grad_layout) -> None:
    ours = trained(Adam, torch.channels_last, grad_layout, fused=True)
    theirs = trained(torch.optim.Adam, torch.contiguous_format, torch.contiguous_format, fused=False)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **SAME_SUMS)


def test_steps_are_those_of_the_fused_kernel_to_the_bit() -> None:
    layouts = (torch.channels_last, torch.channels_last)
    ours, theirs = (trained(kind, *layouts, fused=True) for kind in (Adam, torch.optim.Adam))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_step_copies_no_weight() -> None:
    weight = nn.Parameter(torch.randn(8, 5, 3, 3).to(memory_format=torch.channels_last))
    weight.grad = torch.randn_like(weight)
    optimizer = Adam([weight], fused=True)
    optimizer.step()
    copied = [call.input_shapes[0] for call in recorded_calls(optimizer.step) if call.name == "aten::copy_"]
    # PyTorch's own copies two; the number of the step is copied too.
    assert not any(len(shape) == 4 for shape in copied)
