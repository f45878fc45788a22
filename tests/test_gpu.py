"""What only a GPU can show: full-size parity per dtype, a training run, capture in a CUDA graph."""

import copy

import pytest
import torch
from tolerances import FULL_SIZE
from torch import Tensor

from fastmsflow import MSFlow, MultiScaleFlow
from fastmsflow.kernels import tables

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
CHANNELS, GRIDS = (256, 512, 1024), (64, 32, 16)


@pytest.fixture(params=["own convolution", "vendor's convolution"])
def convolution(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "convolves", lambda *_: request.param == "own convolution")


def full_size(batch: int) -> tuple[MultiScaleFlow, list[Tensor]]:
    torch.manual_seed(0)
    flow = MultiScaleFlow(CHANNELS).cuda().to(memory_format=torch.channels_last)
    return flow, [torch.randn(batch, c, g, g, device="cuda") for c, g in zip(CHANNELS, GRIDS, strict=True)]


def outputs_and_gradients(flow: MultiScaleFlow, x: list[Tensor], backend: str, dtype: torch.dtype | None) -> list:
    flow.backend = backend
    x = [level.detach().requires_grad_() for level in x]
    with torch.autocast("cuda", dtype or torch.float16, enabled=dtype is not None):
        z, log_det = flow(x)
        nll = 0.5 * sum(level.float().square().sum(dim=(1, 2, 3)) for level in z) - log_det
    gradients = torch.autograd.grad(nll.mean(), [*flow.parameters(), *x])
    return [*z, log_det, *gradients]


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_parity_with_float64(name: str, convolution: None) -> None:
    flow, x = full_size(2)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    try:
        dtype = getattr(torch, name) if name in ("float16", "bfloat16") else None
        ours = outputs_and_gradients(flow, x, "triton", dtype)
        truth = outputs_and_gradients(flow.double(), [level.double() for level in x], "torch", None)
    finally:
        torch.backends.cudnn.allow_tf32 = before
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, truth, strict=True)]
    assert max(errors) < FULL_SIZE[name]


def losses(backend: str, seed: int, steps: int = 50) -> list[float]:
    flow, x = full_size(8)
    flow.backend = backend
    generator = torch.Generator("cuda").manual_seed(seed)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-4)
    result = []
    for _ in range(steps):
        order = torch.randperm(8, device="cuda", generator=generator)
        with torch.autocast("cuda", torch.bfloat16):
            loss = flow.nll([level[order] for level in x]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 2.0)
        optimizer.step()
        result.append(loss.item())
    return result


def test_fifty_steps_stay_within_the_spread_of_two_reference_runs(convolution: None) -> None:
    first, second, ours = losses("torch", 0), losses("torch", 1), losses("triton", 0)
    span = abs(first[0] - first[-1])
    spread = max(abs(a - b) for a, b in zip(first, second, strict=True)) + 1e-3 * span
    assert max(abs(a - b) for a, b in zip(ours, first, strict=True)) < 2 * spread


def test_a_cuda_graph_captures_the_flow(convolution: None) -> None:
    flow, x = full_size(2)
    flow.backend = "triton"
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            expected = flow(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = flow(x)
        graph.replay()
    torch.testing.assert_close(captured, expected)


def test_predictions_are_replayed_and_follow_weights_and_autocast() -> None:
    torch.manual_seed(0)
    model = MSFlow("resnet18", pretrained=False, image_size=(128, 128), blocks=(1, 1, 1), backend="triton").cuda()
    model = model.eval().for_inference(torch.float16)
    images = [torch.rand(2, 3, 128, 128, device="cuda") for _ in range(4)]

    def eager(x: Tensor) -> Tensor:
        # A copy has recorded nothing yet.
        with torch.no_grad():
            return copy.deepcopy(model).scores(x).log_score

    for x in images:
        torch.testing.assert_close(model.predict(x).log_score, eager(x), rtol=1e-3, atol=1e-3)
    assert len(model._replay._recorded) == 1
    # Gives up what the graph had kept, and comes back to it.
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            model.predict(images[0])
        torch.testing.assert_close(model.predict(images[1]).log_score, eager(images[1]), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        model.flow.parallel_flows[0].blocks[0].global_offset.add_(1)
    for x in images:
        torch.testing.assert_close(model.predict(x).log_score, eager(x), rtol=1e-3, atol=1e-3)
