"""The convolution of a training step on a CPU, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmsflow import MultiScaleFlow, backend
from fastmsflow.cpu import onednn, training
from fastmsflow.ops.conv3x3 import conv3x3
from fastmsflow.reference.convolution_relu import Geometry
from tests.helpers.ops_parity import error_in_the_norm
from tests.helpers.tolerances import WINOGRAD

pytestmark = pytest.mark.skipif(not onednn.is_available(), reason="PyTorch has no oneDNN for this CPU")


def operands(batch: int, inputs: int, outputs: int, grid: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch)
    shapes = ((batch, inputs, *grid), (outputs, inputs, 3, 3), (outputs,))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def gradients(operands: list[Tensor], grad_out: Tensor, choice: backend.Backend) -> list[Tensor]:
    """Returns the output and the gradients of all operands."""
    out = conv3x3(*operands, choice)
    return [out, *torch.autograd.grad(out, operands, grad_out)]


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the algorithm compute what is too small for it to win."""
    monkeypatch.setattr(training, "FEWEST_TILES", 1)
    monkeypatch.setattr(training, "NARROWEST", 1.0)


@pytest.mark.parametrize(
    ("batch", "inputs", "outputs", "grid"),
    [(1, 112, 144, (64, 65)), (3, 128, 160, (37, 39)), (5, 130, 128, (33, 31))],
)
def test_output_and_gradients_agree_with_float64(
    batch: int, inputs: int, outputs: int, grid: tuple[int, int], everywhere: None
) -> None:
    given = operands(batch, inputs, outputs, grid)
    grad_out = torch.randn(batch, outputs, *grid, generator=torch.Generator().manual_seed(0))
    found = gradients(given, grad_out, "auto")
    assert "_Convolution" in type(found[0].grad_fn).__name__
    expected = gradients([x.detach().double().requires_grad_() for x in given], grad_out.double(), "torch")
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double() - theirs).abs().max() < WINOGRAD * theirs.abs().max()


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the algorithm run in float64, for which oneDNN packs nothing."""

    def pack(weight: Tensor, bias: Tensor | None, geometry: Geometry, shape: tuple[int, ...]) -> Plain:
        return Plain(weight, bias, geometry)

    monkeypatch.setattr(onednn, "pack", pack)


class Plain(onednn.Packed):
    """Computes by PyTorch what the packed convolution does."""

    def __call__(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, *self.geometry)


def test_gradients_and_their_gradients_are_those_of_finite_differences(in_float64: None) -> None:
    given = [x.detach().double().requires_grad_() for x in operands(2, 3, 2, (5, 6))]
    assert torch.autograd.gradcheck(training.convolve, given)
    assert torch.autograd.gradgradcheck(training.convolve, given)


def test_only_what_needs_a_gradient_gets_one(everywhere: None) -> None:
    x, weight, bias = operands(1, 24, 40, (9, 9))
    out = conv3x3(x.detach(), weight, bias)
    assert torch.autograd.grad(out.sum(), [weight])[0].shape == weight.shape
    (grad_x,) = torch.autograd.grad(conv3x3(x, weight.detach()).sum(), [x])
    assert grad_x.shape == x.shape


def test_batched_gradients_and_those_of_torch_func_are_left_to_pytorch(everywhere: None) -> None:
    x, weight, bias = operands(1, 24, 40, (9, 9))
    out = conv3x3(x, weight, bias)
    grad_out = torch.stack((torch.ones_like(out), -torch.ones_like(out)))
    batched = torch.autograd.grad(out, [x, weight, bias], grad_out, retain_graph=True, is_grads_batched=True)
    expected = torch.autograd.grad(out.sum(), [x, weight, bias])
    of_func = torch.func.grad(lambda x: conv3x3(x, weight, bias).sum())(x.detach())
    for found, wanted in ((of_func, expected[0]), *zip((each[0] for each in batched), expected, strict=True)):
        assert error_in_the_norm(found, wanted) < WINOGRAD
    assert all(torch.equal(one, -other) for one, other in batched)


def test_too_few_tiles_and_narrow_filters_are_left_to_pytorch() -> None:
    for sizes in ((1, 192, 256, (64, 64)), (2, 128, 192, (64, 64))):
        given = operands(*sizes)
        assert not training.serves(*given)
    x, weight, bias = operands(2, 192, 256, (64, 64))
    assert training.serves(x, weight, bias)
    assert not training.serves(x.detach(), weight.detach(), bias.detach())
    with torch.autocast("cpu", torch.bfloat16):
        assert not training.serves(x, weight, bias)


def test_a_step_of_the_flow_has_the_gradients_of_the_reference(everywhere: None) -> None:
    flow = MultiScaleFlow((256, 128, 64), blocks=(1, 1, 1))
    features = [torch.randn(2, c, side, side) for c, side in zip(flow.channels, (24, 12, 6), strict=True)]
    found = {}
    for choice in ("auto", "torch"):
        with backend.use(choice):
            flow.nll(features).mean().backward()
        found[choice] = [parameter.grad for parameter in flow.parameters()]
        flow.zero_grad()
    errors = [error_in_the_norm(ours, theirs) for ours, theirs in zip(found["auto"], found["torch"], strict=True)]
    assert max(errors) < 1e-3
