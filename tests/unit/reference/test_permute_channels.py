"""The permutation of channels: its gradients, of every kind, are those of an index."""

import pytest
import torch
from torch import Tensor

from fastmsflow.reference.coupling import invert_permutation, permute_channels
from tests.helpers.recorded_calls import recorded_calls

CHANNELS = 7


@pytest.fixture
def perm() -> Tensor:
    return torch.randperm(CHANNELS, generator=torch.Generator().manual_seed(0))


def features() -> Tensor:
    return torch.randn(2, CHANNELS, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_gradients_of_first_and_second_order_are_right(perm: Tensor) -> None:
    def permute(x: Tensor) -> Tensor:
        return permute_channels(x, perm, invert_permutation(perm))

    x = features().requires_grad_()
    assert torch.autograd.gradcheck(permute, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: permute(x).square(), x)


def test_gradients_equal_those_of_an_index_to_the_bit(perm: Tensor) -> None:
    weight = features().flip(1)
    grads = []
    for permute in (lambda x: permute_channels(x, perm, invert_permutation(perm)), lambda x: x[:, perm]):
        x = features().to(memory_format=torch.channels_last).requires_grad_()
        (permute(x) * weight).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_the_gradient_is_not_scattered(perm: Tensor) -> None:
    x = features().requires_grad_()
    calls = recorded_calls(lambda: permute_channels(x, perm, invert_permutation(perm)).sum().backward())
    names = {call.name for call in calls}
    assert "aten::index" in names and not any("index_put" in name for name in names)


@pytest.mark.parametrize("jacobian", [torch.func.jacrev, torch.func.jacfwd])
def test_function_transforms_differentiate_it(perm: Tensor, jacobian) -> None:
    found = jacobian(lambda x: permute_channels(x, perm, invert_permutation(perm)))(features())
    assert torch.equal(found, torch.func.jacrev(lambda x: x[:, perm])(features()))


def test_a_compiler_sees_an_index(perm: Tensor) -> None:
    inverse = invert_permutation(perm)
    compiled = torch.compile(lambda x: permute_channels(x, perm, inverse), backend="eager", fullgraph=True)
    x = features().requires_grad_()
    assert torch.equal(compiled(x), x[:, perm])
