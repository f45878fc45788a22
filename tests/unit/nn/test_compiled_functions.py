"""Functions of a frozen module are compiled once, anew after a change, and nowhere but on a CPU without gradients."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmsflow import InputError, MSFlow, UnavailableError, backend
from fastmsflow.cpu import convolution, onednn, winograd
from fastmsflow.nn.compiled_functions import OPTIONS, CompiledFunctions
from fastmsflow.nn.fuse_conv_relu import FusedConvolution
from fastmsflow.ops.conv3x3 import conv3x3
from tests.helpers.tolerances import COMPILED

SIZE = (32, 32)


class Scale(nn.Module):
    """A module with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 2.0), False)

    def scaled(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x * self.weight,)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The functions that were compiled; the compiler is a stand-in that returns them as they are."""
    functions: list[Any] = []

    def compile(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        assert options == {"fullgraph": True, "options": OPTIONS}
        functions.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    return functions


def image(batch: int = 1, **options: Any) -> Tensor:
    return torch.ones(batch, 3, 4, 4, **options)


def test_a_function_is_compiled_once_and_by_default_never(compilations: list[Any]) -> None:
    module, eager, compiled = Scale(), CompiledFunctions(), CompiledFunctions(enabled=True)
    assert eager(module.scaled, [image()], module)[0].mean() == 2
    assert not compilations
    for _ in range(3):
        assert compiled(module.scaled, [image()], module)[0].mean() == 2
    assert len(compilations) == 1


def test_a_change_of_weights_threads_or_backend_compiles_anew(compilations: list[Any]) -> None:
    module, compiled = Scale(), CompiledFunctions(enabled=True)

    def count() -> int:
        compiled(module.scaled, [image()], module)
        return len(compilations)

    assert (count(), count()) == (1, 1)
    module.weight.add_(1)
    assert (count(), count()) == (2, 2)
    module.weight = nn.Parameter(torch.ones(1), False)
    assert (count(), count()) == (3, 3)
    with backend.use("torch"):
        assert (count(), count()) == (4, 4)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert count() == 5
    finally:
        torch.set_num_threads(threads)
    compiled.clear()
    assert (count(), count()) == (6, 6)
    memory = bytearray(4)
    for compilation in (7, 8):
        module.weight.data = torch.frombuffer(memory, dtype=torch.float32)
        assert (count(), count()) == (compilation, compilation)


def test_copies_compile_their_own_programs(compilations: list[Any]) -> None:
    module, compiled = Scale(), CompiledFunctions(enabled=True)
    compiled(module.scaled, [image()], module)
    for other in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        before = len(compilations)
        other(module.scaled, [image()], module)
        assert len(compilations) == before + 1
    assert not pickle.loads(pickle.dumps(CompiledFunctions())).enabled


def test_gradients_are_computed_in_eager_mode(compilations: list[Any]) -> None:
    module, compiled, x = Scale(), CompiledFunctions(enabled=True), image(requires_grad=True)
    compiled(module.scaled, [x], module)[0].sum().backward()
    assert x.grad is not None and x.grad.mean() == 2
    assert not compilations
    with torch.no_grad():
        compiled(module.scaled, [x], module)
    assert len(compilations) == 1


def test_every_memory_format_and_mode_reaches_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool, bool]] = []

    class Watched(Scale):
        def scaled(self, x: Tensor) -> tuple[Tensor, ...]:
            is_last = x.is_contiguous(memory_format=torch.channels_last)
            seen.append((is_last, torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
            return super().scaled(x)

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    module, compiled = Watched(), CompiledFunctions(enabled=True)
    compiled(module.scaled, [image(2)], module)
    compiled(module.scaled, [image(2).contiguous(memory_format=torch.channels_last)], module)
    with torch.inference_mode():
        compiled(module.scaled, [image(2)], module)
    assert set(seen) == {(True, False, False)}


@pytest.fixture(scope="module")
def tiny() -> MSFlow:
    """Makes a model that a C++ compiler takes seconds for."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"condition_channels": (4, 4, 4), "blocks": (1, 1, 1), "backend": "torch"}
    return MSFlow("test_efficientnet", pretrained=False, image_size=SIZE, **options).eval()


@pytest.mark.slow
def test_a_compiled_model_predicts_as_in_eager_mode(tiny: MSFlow, caplog: pytest.LogCaptureFixture) -> None:
    eager, compiled = tiny.for_inference(), tiny.for_inference(compile=True)
    x = torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        for ours, theirs in zip(compiled.predict(x), eager.predict(x), strict=True):
            torch.testing.assert_close(ours, theirs, **COMPILED)
    # Later calls compile nothing, and a frozen constant is not added into.
    told = [record.getMessage().split(" took ")[0] for record in caplog.records if record.name == "fastmsflow"]
    assert told == ["torch.compile: compute_features", "torch.compile: compute_log_likelihoods"]


@pytest.mark.slow
def test_from_a_second_batch_size_on_one_program_serves_all(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    module, compiled = Scale(), CompiledFunctions(enabled=True)
    before = torch._dynamo.config.get_config_copy()
    for batch in (2, 3, 4, 5):
        assert torch.equal(compiled(module.scaled, [image(batch)], module)[0], 2 * image(batch))
    told = [record.getMessage() for record in caplog.records if record.name == "fastmsflow"]
    assert [line.rpartition(" ")[2] for line in told] == ["2", "3"]
    assert torch._dynamo.config.get_config_copy() == before


@pytest.mark.slow
def test_changed_weights_and_another_module_get_programs_of_their_own() -> None:
    module, compiled = Scale(), CompiledFunctions(enabled=True)
    other, others = Scale(), CompiledFunctions(enabled=True)
    other.weight.fill_(5)
    for factor in (2, 3):
        module.weight.fill_(factor)
        for batch in (1, 2, 1, 3):
            assert torch.equal(compiled(module.scaled, [image(batch)], module)[0], factor * image(batch))
            assert torch.equal(others(other.scaled, [image(batch)], other)[0], 5 * image(batch))
    # A program holds weights.
    weight = weakref.ref(module.weight)
    del module, compiled
    gc.collect()
    assert weight() is None


class Convolutions(nn.Module):
    """Convolutions that Winograd's algorithm computes on a CPU, of weights and of weights that are made of them."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        first, second = (nn.Conv2d(128, 128, 3, **options).requires_grad_(False) for _ in range(2))
        self.first, self.second = map(FusedConvolution, (first, second))
        self.weight = nn.Parameter(torch.randn(128, 144, 3, 3) / 36, False)

    def convolved(self, x: Tensor) -> tuple[Tensor, ...]:
        return (conv3x3(self.second(self.first(x), x).tanh(), self.weight[:, :128]),)


@pytest.mark.slow
@pytest.mark.skipif(not onednn.is_available(), reason="Winograd's algorithm runs on x86-64 only")
@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"padding": 1, "padding_mode": "reflect"}], ids=["zeros", "reflect"]
)
def test_programs_convolve_by_winograds_algorithm(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    convolution.set_winograd_memory(None)
    module, compiled = Convolutions(**options), CompiledFunctions(enabled=True)
    calls: list[torch.Size] = []
    convolve = winograd.convolve
    monkeypatch.setattr(
        winograd, "convolve", lambda x, *args, **more: calls.append(x.shape) or convolve(x, *args, **more)
    )
    # A program of one size, and the one for all sizes; odd grids, the smallest of which has too few tiles.
    for shape in ((1, 128, 17, 19), (3, 128, 17, 19), (2, 128, 17, 19), (2, 128, 3, 5)):
        x = torch.randn(shape)
        with backend.use("torch"):
            (expected,) = module.convolved(x)
        calls.clear()
        (found,) = compiled(module.convolved, [x], module)
        torch.testing.assert_close(found, expected, **COMPILED)
        calls.clear()
        torch.testing.assert_close(compiled(module.convolved, [x], module)[0], found, rtol=0, atol=0)
        assert calls == ([x.shape] * 3 if x.shape[2] > 3 else []), shape


@pytest.mark.slow
@pytest.mark.skipif(not onednn.is_available(), reason="Winograd's algorithm runs on x86-64 only")
def test_a_program_holds_filters_once() -> None:
    torch.manual_seed(0)
    convolution.set_winograd_memory(None)
    module, compiled, x = Convolutions(padding=1), CompiledFunctions(enabled=True), torch.randn(1, 128, 16, 16)
    compiled(module.convolved, [x], module)
    assert convolution._held_bytes() == 3 * 36 * 128 * 128 * 4
    del module, compiled
    gc.collect()
    assert convolution._held_bytes() == 0


@pytest.mark.slow
def test_graphs_of_others_call_no_operator_of_this_library() -> None:
    module, x = Convolutions(padding=1), torch.randn(1, 128, 16, 16)
    targets: list[str] = []

    def kept(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.no_grad():
        torch.compile(module.convolved, backend=kept)(x)
    assert any("conv2d" in name for name in targets) and not any("fastmsflow" in name for name in targets)


def test_calls_of_two_threads_may_overlap() -> None:
    first, second = convolution.in_programs(), convolution.in_programs()
    before = convolution._in_programs
    for call in (first.__enter__, second.__enter__, lambda: first.__exit__(None, None, None)):
        call()
        assert convolution._in_programs == onednn.is_available()
    second.__exit__(None, None, None)
    assert convolution._in_programs is before is False


@pytest.mark.slow
def test_a_program_follows_autocast() -> None:
    torch.manual_seed(0)
    module, compiled, x = Convolutions(padding=1), CompiledFunctions(enabled=True), torch.randn(1, 128, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        (found,), (expected,) = compiled(module.convolved, [x], module), module.convolved(x)
    assert found.dtype == expected.dtype == torch.bfloat16


def test_a_machine_without_a_compiler_is_told_of_in_one_line(tiny: MSFlow) -> None:
    with (
        torch._inductor.config.patch({"cpp.cxx": ("/none/such/compiler",)}),
        pytest.raises(UnavailableError, match=r"^torch.compile needs a C\+\+ compiler, and there is none: install"),
    ):
        tiny.for_inference(compile=True)


def test_a_model_on_a_gpu_is_not_compiled(tiny: MSFlow) -> None:
    with pytest.raises(InputError, match=r"^compile=True is for CPUs; on a GPU leave it out"):
        copy.deepcopy(tiny).to("meta").for_inference(compile=True)
