"""Tests what only a GPU can show: full-size parity per dtype, a training run, capture in a CUDA graph."""

from collections.abc import Iterator
from copy import deepcopy

import pytest
import torch
from torch import Tensor

from fastmsflow import MSFlow, MultiScaleFlow
from fastmsflow.inference import TiledPredictor
from fastmsflow.kernels import configs
from fastmsflow.tiling import Position, Tiling
from tests.helpers.error_log import assert_within, note
from tests.helpers.ops_parity import DEVICE, error_in_the_norm
from tests.helpers.tolerances import FIFTY_STEPS, FLIPPED, FULL_SIZE, FULL_SIZE_LOG_DET_PER_ELEMENT, REPLAYED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
CHANNELS, GRIDS = (256, 512, 1024), (64, 32, 16)
STEPS = 50
Results = tuple[list[Tensor], Tensor, dict[str, Tensor]]


@pytest.fixture(params=["own convolution", "vendor's convolution"])
def convolution(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "own_convolution_is_faster", lambda *_: request.param == "own convolution")


def full_size(batch: int) -> tuple[MultiScaleFlow, list[Tensor]]:
    torch.manual_seed(0)
    flow = MultiScaleFlow(CHANNELS).to(DEVICE).to(memory_format=torch.channels_last)
    return flow, [torch.randn(batch, c, g, g, device=DEVICE) for c, g in zip(CHANNELS, GRIDS, strict=True)]


def outputs_and_gradients(flow: MultiScaleFlow, x: list[Tensor], backend: str, dtype: torch.dtype | None) -> Results:
    """z, log_det, and the gradients of the parameters and of x by name."""
    flow.backend = backend
    x = [level.detach().requires_grad_() for level in x]
    with torch.autocast(DEVICE, dtype or torch.float16, enabled=dtype is not None):
        z, log_det = flow(x)
        nll = 0.5 * sum(level.to(log_det.dtype).square().sum(dim=(1, 2, 3)) for level in z) - log_det
    leaves = dict(flow.named_parameters()) | {f"level {i}": level for i, level in enumerate(x)}
    gradients = torch.autograd.grad(nll.mean(), list(leaves.values()))
    return [level.detach() for level in z], log_det.detach(), dict(zip(leaves, gradients, strict=True))


@pytest.fixture(scope="module")
def reference() -> Results:
    flow, x = full_size(2)
    return outputs_and_gradients(flow.double(), [level.double() for level in x], "torch", None)


def output_errors(
    z: list[Tensor], log_det: Tensor, true_z: list[Tensor], true_log_det: Tensor, name: str
) -> Iterator[tuple[str, float, float]]:
    """Yields (what, error, bound) of every output in the precision ``name``."""
    for i, (ours, true) in enumerate(zip(z, true_z, strict=True)):
        yield f"z, level {i}", error_in_the_norm(ours, true), FULL_SIZE[name]
    elements = sum(level[0].numel() for level in true_z)
    off = (log_det.double() - true_log_det).abs().max().item() / elements
    yield "log-det, nats an element", off, FULL_SIZE_LOG_DET_PER_ELEMENT[name]


def errors(found: Results, reference: Results, name: str) -> Iterator[tuple[str, float, float]]:
    """Yields (what, error, bound) of every output and gradient in the precision ``name``."""
    (*outputs, gradients), (*reference_outputs, reference_gradients) = found, reference
    yield from output_errors(*outputs, *reference_outputs, name)
    for key, true in reference_gradients.items():
        yield f"gradient of {key}", error_in_the_norm(gradients[key], true), FLIPPED[name]


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_parity_with_float64(
    name: str, reference: Results, convolution: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", name == "tf32")
    flow, x = full_size(2)
    dtype = getattr(torch, name) if name in ("float16", "bfloat16") else None
    # PyTorch's own errors, to set ours beside; which values change sides is chance, so none is held against another.
    for what, error, bound in errors(outputs_and_gradients(flow, x, "torch", dtype), reference, name):
        note(f"PyTorch's own: {what}", error, bound)
    assert_within(errors(outputs_and_gradients(flow, x, "triton", dtype), reference, name))


def losses(flow: MultiScaleFlow, x: list[Tensor], backend: str, seed: int) -> list[float]:
    """Returns the losses of a training whose batches come in an order of ``seed``, which changes nothing but the order
    of sums."""
    flow = deepcopy(flow)
    flow.backend = backend
    generator = torch.Generator(DEVICE).manual_seed(seed)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-4)
    result = []
    for _ in range(STEPS):
        order = torch.randperm(len(x[0]), device=DEVICE, generator=generator)
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = flow.nll([level[order] for level in x]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 2.0)
        optimizer.step()
        result.append(loss.detach())
    return torch.stack(result).tolist()


def furthest(losses: list[float], others: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(losses, others, strict=True))


@pytest.fixture(scope="module")
def reference_runs() -> list[list[float]]:
    flow, x = full_size(8)
    return [losses(flow, x, "torch", seed) for seed in range(3)]


def test_fifty_steps_stay_near_reference_runs(reference_runs: list[list[float]], convolution: None) -> None:
    first, *others = reference_runs
    span = abs(first[0] - first[-1])
    assert first[-1] < first[0]
    spread = max(furthest(other, first) for other in others)
    bound = FIFTY_STEPS["of the spread"] * spread + FIFTY_STEPS["of the span"] * span
    flow, x = full_size(8)
    assert_within([("losses", furthest(losses(flow, x, "triton", 0), first), bound)])


def test_a_cuda_graph_captures_the_flow(convolution: None) -> None:
    flow, x = full_size(2)
    flow.backend = "triton"
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            expected = flow(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            z, log_det = flow(x)
        # What was captured has not run; what is there now is not to be taken for it.
        for out in (*z, log_det):
            out.fill_(float("nan"))
        graph.replay()
    # In a capture the vendor may choose another algorithm: two results, each as far off as it may be.
    assert_within((what, error, 2 * bound) for what, error, bound in output_errors(z, log_det, *expected, "float32"))


def test_predictions_are_replayed_and_follow_weights_and_autocast() -> None:
    torch.manual_seed(0)
    model = MSFlow("resnet18", pretrained=False, image_size=(128, 128), blocks=(1, 1, 1), backend="triton")
    model = model.to(DEVICE).eval().for_inference(torch.float16)
    images = [torch.rand(2, 3, 128, 128, device=DEVICE) for _ in range(4)]

    def eager(x: Tensor) -> Tensor:
        # A copy has recorded nothing yet.
        with torch.no_grad():
            return deepcopy(model).scores(x).log_score

    for x in images:
        torch.testing.assert_close(model.predict(x).log_score, eager(x), **REPLAYED)
    assert len(model._graphs._recorded) == 1
    # Gives up what the graph had kept, and comes back to it.
    for _ in range(2):
        with torch.autocast(DEVICE, torch.bfloat16):
            model.predict(images[0])
        torch.testing.assert_close(model.predict(images[1]).log_score, eager(images[1]), **REPLAYED)
    with torch.no_grad():
        model.flow.parallel_flows[0].blocks[0].global_offset.add_(1)
    for x in images:
        torch.testing.assert_close(model.predict(x).log_score, eager(x), **REPLAYED)


@pytest.mark.parametrize("position", ["tile", "image"])
def test_images_in_tiles_are_scored_as_on_a_cpu(position: Position) -> None:
    torch.manual_seed(0)
    model = MSFlow("resnet18", pretrained=False, image_size=(128, 128), blocks=(1, 1, 2)).eval()
    model.tiling = Tiling(128, position=position)
    images = torch.rand(2, 3, 200, 333)
    expected = TiledPredictor(model, 128).predict(images)
    predictor = TiledPredictor(model.to(DEVICE), 128)
    # From the second batch on a graph is replayed; the last batch of an image pair is not full.
    for _ in range(2):
        for given, true in zip(predictor.predict(images.to(DEVICE)), expected, strict=True):
            torch.testing.assert_close(given.cpu(), true, **REPLAYED)
    pixels = (images[0] * 255).byte()
    on_cpu, on_gpu = predictor.scores([pixels, pixels.to(DEVICE)])
    torch.testing.assert_close(on_gpu.absolute_score, on_cpu.absolute_score, **REPLAYED)
