"""``torch.compile`` takes the flow and the model as one graph, and follows ``backend.use``."""

import threading

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from fastmsflow import MSFlow, MultiScaleFlow, backend
from fastmsflow.kernels import configs
from fastmsflow.ops.fusion import pool_and_concat, split_and_upsample
from fastmsflow.ops.likelihood import log_likelihood_maps
from tests.helpers.ops_parity import DEVICE
from tests.helpers.tolerances import FLOW_CLOSE


@pytest.fixture(autouse=True)
def compile_anew() -> None:
    torch._dynamo.reset()


@pytest.fixture
def new_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of the device yet: what finds out must not be traced."""
    monkeypatch.setattr(backend, "_faults", {})
    monkeypatch.setattr(configs, "_chips", {})


def flow_and_features() -> tuple[MultiScaleFlow, list[Tensor]]:
    torch.manual_seed(0)
    flow = MultiScaleFlow((8, 12), (8, 8), (1, 1)).to(DEVICE).eval()
    return flow, [torch.randn(2, 8, 4, 6, device=DEVICE), torch.randn(2, 12, 2, 3, device=DEVICE)]


@pytest.mark.parametrize("choice", ["torch", "triton"])
def test_inference_of_the_flow_is_one_graph(choice: str, new_device: None) -> None:
    flow, x = flow_and_features()
    flow.backend = choice
    with torch.no_grad():
        ours = torch.compile(flow.log_likelihood_maps, fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(ours, flow.log_likelihood_maps(x), **FLOW_CLOSE)


@pytest.mark.parametrize("name", ["forward", "inverse"])
@pytest.mark.parametrize("choice", ["torch", "triton"])
def test_both_directions_are_one_graph(choice: str, name: str) -> None:
    flow, x = flow_and_features()
    flow.backend = choice
    ours = torch.compile(getattr(flow, name), fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(ours, getattr(flow, name)(x), **FLOW_CLOSE)


def test_a_training_step_is_one_graph() -> None:
    """Compiles the PyTorch backend; test_backend.py does the kernels."""
    flow, x = flow_and_features()
    flow.backend = "torch"
    losses = [call(x).mean() for call in (torch.compile(flow.nll, fullgraph=True, backend="aot_eager"), flow.nll)]
    ours, theirs = (torch.autograd.grad(loss, list(flow.parameters())) for loss in losses)
    torch.testing.assert_close(ours, theirs, **FLOW_CLOSE)


def test_prediction_from_images_is_one_graph() -> None:
    model = MSFlow("test_resnet.r160_in1k", pretrained=False, image_size=(32, 64), blocks=(1, 1, 1), backend="torch")
    images = torch.rand(2, 3, 32, 64)
    ours = torch.compile(model.eval().predict, fullgraph=True, backend="eager")(images)
    torch.testing.assert_close(list(ours), list(model.predict(images)), **FLOW_CLOSE)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_operations_on_any_number_of_levels_are_one_graph_without_gradients(levels: int) -> None:
    """Holds also if gradients are enabled and no input needs one."""
    maps = [torch.randn(1, 4, 2, 3, device=DEVICE) for _ in range(levels)]

    def operations(maps: list[Tensor]) -> list[Tensor]:
        joint = pool_and_concat(maps, "triton")
        return [*split_and_upsample(joint, None, maps, "triton"), *log_likelihood_maps(maps, "triton")]

    ours = torch.compile(operations, fullgraph=True, backend="eager")(maps)
    torch.testing.assert_close(ours, operations(maps), **FLOW_CLOSE)


def test_compiled_code_follows_use() -> None:
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def one_by_the_kernels(x: Tensor) -> Tensor:
        return x + (1 if backend.uses_triton("auto", x) else 2)

    x = torch.zeros(1, device="cpu")
    assert one_by_the_kernels(x) == 2
    with backend.use("torch"):
        assert one_by_the_kernels(x) == 2
    with backend.use("triton"):
        assert one_by_the_kernels(x.to(DEVICE)) == 1
    assert one_by_the_kernels(x) == 2
    assert counter.frame_count == 3, "what was compiled before is not taken again"


def test_no_use_outlives_its_threads() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with backend.use("triton"):
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other, daemon=True)
    with backend.use("torch"):
        thread.start()
        inside.wait()
        assert backend.override() == "torch"
    leave.set()
    thread.join()
    assert backend._override_when_compiled is None
