"""Convolutions fused with what follows them: where they are found, what they compute, when they are not used."""

import copy
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.testing import EagerAndRecordGraphs

from fastmsflow import MSFlow, backend
from fastmsflow.nn import fuse_conv_relu
from fastmsflow.nn.feature_extractor import FOLDED_SIDE, FeatureExtractor
from fastmsflow.nn.fuse_conv_relu import FusedConvolution, fuse_convolutions
from fastmsflow.ops import convolution_relu as ops
from fastmsflow.reference import convolution_relu as twin
from tests.helpers.ops_parity import error_in_the_norm
from tests.helpers.tolerances import FOLDED, FUSED

pytestmark = pytest.mark.slow
SIZE = (64, 96)


def folded(name: str, image_size: tuple[int, int] = SIZE) -> FeatureExtractor:
    torch.manual_seed(0)
    result = FeatureExtractor(name, pretrained=False, image_size=image_size)
    for norm in result.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 2)
    result.fold_batch_norms(image_size)
    return result


def fused(original: FeatureExtractor, image_size: tuple[int, int] = SIZE) -> FeatureExtractor:
    result = copy.deepcopy(original)
    result.fuse_convolutions(image_size)
    return result


def found(net: nn.Module) -> list[FusedConvolution]:
    return [module for module in net.modules() if isinstance(module, FusedConvolution)]


def count(net: nn.Module, kind: type[nn.Module]) -> int:
    return sum(type(module) is kind for module in net.modules())


def images(batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def run(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x)[0]


@pytest.mark.parametrize(
    ("name", "fusions", "residuals", "convolutions_left"),
    [
        # Stages 1 to 3; the downsampling convolutions are the residuals, and stay.
        ("resnet18", 1 + 2 * 6, 6, 2),
        ("wide_resnet50_2", 1 + 3 * 13, 13, 3),
        ("resnext50_32x4d", 1 + 3 * 13, 13, 3),
        ("regnetx_002", 1 + 3 * 6, 6, 3),
        ("vgg11_bn", 8, 0, 0),
        # Its blocks begin with norms: in a dense layer the first convolution has a ReLU behind it, the second has not.
        ("densenet121", 1 + 6 + 12 + 24, 0, 6 + 12 + 24 + 2),
    ],
)
def test_every_convolution_with_a_relu_behind_it_is_found(
    name: str, fusions: int, residuals: int, convolutions_left: int
) -> None:
    extractor = folded(name)
    relus = count(extractor, nn.ReLU)
    net = fused(extractor).net
    assert isinstance(net, fx.GraphModule)
    calls = [node for node in net.graph.nodes if node.op == "call_module" and node.target in dict(net.named_modules())]
    calls = [node for node in calls if isinstance(net.get_submodule(node.target), FusedConvolution)]
    assert (len(found(net)), len(calls)) == (fusions, fusions)
    assert sum(node.args[1] is not None for node in calls) == residuals
    assert count(net, nn.Conv2d) == convolutions_left
    if name != "densenet121":
        assert (count(net, nn.ReLU), relus) == (0, fusions)


@pytest.mark.parametrize("name", ["resnet18", "regnety_002", "vgg11_bn", "seresnet50"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_features_stay_the_same(name: str, dtype: torch.dtype) -> None:
    original = folded(name)
    result = fused(original).to(dtype)
    with backend.use("torch"):
        features, expected = result(images()), original.to(dtype)(images())
    if name in ("vgg11_bn", "seresnet50"):
        # No biases are added to each other: the arithmetic is the same, and all bits are.
        assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))
    errors = [error_in_the_norm(*pair) for pair in zip(features, expected, strict=True)]
    assert len(found(result)) > 0 and max(errors) < FUSED[str(dtype)[6:]]


@pytest.mark.parametrize("name", ["mobilenetv2_050", "convnext_atto", "vit_tiny_patch16_224"])
def test_a_net_without_such_a_pattern_stays_as_it_is(name: str) -> None:
    extractor = folded(name, (64, 64))
    before = extractor.net
    extractor.fuse_convolutions((64, 64))
    assert extractor.net is before


def test_a_net_that_cannot_be_traced_stays_as_it_is() -> None:
    class Branching(nn.Sequential):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [super().forward(x)] if x.sum() > 0 else [x]

    net = Branching(nn.Conv2d(3, 4, 3), nn.ReLU())
    assert fuse_convolutions(net, torch.rand(1, 3, 8, 8)) is net


def test_a_net_that_takes_no_small_image_is_fused_all_the_same() -> None:
    extractor = folded("resnet18")
    extractor.net = Net(lambda net, x: [F.relu(net.a(x))])
    extractor.net.a = nn.Conv2d(3, 4, FOLDED_SIDE + 6)
    extractor.fuse_convolutions((96, 96))
    assert len(found(extractor)) == 1


class Net(nn.Module):
    """Two convolutions, joined as a test says."""

    def __init__(self, join: Callable[["Net", Tensor], list[Tensor]], **options: object) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(3, 3, 3, padding=1, **options) for _ in range(2))
        self.act, self.join = nn.ReLU(inplace=True), join

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.join(self, x)


def through_a_name(net: Net, x: Tensor) -> list[Tensor]:
    """The sum is written over the convolution's output, and read by both names."""
    y = net.b(x)
    alias = y
    y += x
    return [F.relu(y), alias]


@pytest.mark.parametrize(
    "join",
    [
        lambda net, x: [(y := net.a(x)), net.act(y + x)],
        lambda net, x: [(y := net.a(x)) + F.relu(y)],
        lambda net, x: [(z := net.a(x) + x) + z.relu()],
        lambda net, x: [F.relu((y := net.a(x)) + y)],
        lambda net, x: [F.relu(net.a(net.a(x)))],
        lambda net, x: [F.relu(net.a(x) + 1)],
        lambda net, x: [F.relu(torch.add(x, net.a(x), alpha=2))],
        lambda net, x: [F.relu(net.a(x[:, :, :1, :1]) + x)],
        through_a_name,
    ],
    ids=["returned", "used again", "sum used again", "to itself", "called twice", "number", "scaled", "wider", "name"],
)
def test_what_something_else_uses_is_not_fused(join) -> None:
    net, x = Net(join).eval(), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        expected = [level.clone() for level in net(x)]
        result = fuse_convolutions(net, x)
        assert not found(result)
        assert all(torch.equal(a, b) for a, b in zip(result(x), expected, strict=True))


@pytest.mark.parametrize(
    "join",
    [
        lambda net, x: [F.relu(net.a(x))],
        lambda net, x: [net.a(x).relu_()],
        lambda net, x: [torch.relu(net.a(x))],
        lambda net, x: [F.relu(x + net.a(x))],
        lambda net, x: [net.act(net.a(x).add_(x))],
        lambda net, x: [net.act(torch.add(net.a(x), net.b(x)))],
    ],
    ids=["function", "method", "torch", "second summand", "in place", "two convolutions"],
)
@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_each_way_to_write_it_is_found(join, mode: str) -> None:
    torch.manual_seed(0)
    net, x = Net(join, padding_mode=mode).eval(), torch.randn(1, 3, 8, 8)
    result = fuse_convolutions(net, x)
    assert len(found(result)) == (0 if mode == "circular" else 1)
    assert error_in_the_norm(run(result, x), run(net, x)) < FUSED["float32"]


def test_a_residual_convolutions_bias_moves_into_the_sum() -> None:
    net = Net(lambda net, x: [net.act(net.a(x) + net.b(x))]).eval()
    result = fuse_convolutions(net, torch.randn(1, 3, 8, 8))
    assert torch.equal(result.a.bias, net.a.bias + net.b.bias)
    assert result.b.bias is None
    assert net.b.bias is not None


def test_a_model_for_inference_fuses_and_predicts_the_same() -> None:
    model = MSFlow("resnet18", pretrained=False, image_size=SIZE, blocks=(1, 1, 1), backend="torch").eval()
    fast = model.for_inference()
    assert len(found(fast)) == 13
    assert not found(model)
    for ours, theirs in zip(fast.predict(images()), model.predict(images()), strict=True):
        torch.testing.assert_close(ours, theirs, **FOLDED)


def test_the_kernel_pads_where_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    original = folded("resnet18")
    result, calls = fused(original), []
    pad = fuse_conv_relu.reflection_pad
    monkeypatch.setattr(fuse_conv_relu, "reflection_pad", lambda x, p, b: calls.append((p, b)) or pad(x, p, b))
    features = result(images(1), "triton")
    assert calls == [((3, 3, 3, 3), "triton"), *[((1, 1, 1, 1), "triton")] * 12]
    assert max(error_in_the_norm(*pair) for pair in zip(features, original(images(1)), strict=True)) < FUSED["float32"]
    with backend.use("torch"):
        assert all(torch.equal(a, b) for a, b in zip(features, result(images(1), "triton"), strict=True))


def cudnn_relu(x, weight, bias, stride, padding, dilation, groups) -> Tensor:
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups).relu()


def cudnn_add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups) -> Tensor:
    return (F.conv2d(x, weight, bias, stride, padding, dilation, groups) + alpha * z).relu()


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Stands in for a GPU with cuDNN -> what its operators were given, a tuple a call."""
    calls: list[tuple] = []
    # Not torch.ops.aten.*: PyTorch would look for a CUDA tensor.
    for name, function in (("cudnn_convolution_relu", cudnn_relu), ("cudnn_convolution_add_relu", cudnn_add_relu)):
        monkeypatch.setattr(
            torch.ops.aten, name, lambda *given, function=function: calls.append(given) or function(*given)
        )
    monkeypatch.setattr(ops, "cudnn_may_serve", lambda x: True)
    monkeypatch.setattr(fuse_conv_relu, "cudnn_may_serve", lambda x: True)
    for module in (ops, fuse_conv_relu):
        monkeypatch.setattr(module, "uses_cudnn", lambda backend, x: x.dtype != torch.float64)
    return calls


def strided(groups: int = 2) -> Net:
    torch.manual_seed(0)
    net = Net(lambda net, x: [net.act(net.a(x) + net.b(x))])
    net.a = nn.Conv2d(4, 6, (3, 5), (2, 1), (1, 4), (1, 2), groups)
    net.b = nn.Conv2d(4, 6, 1, (2, 1))
    return net.eval().requires_grad_(False)


def test_cudnn_is_given_the_convolution_and_the_residual(cudnn: list[tuple]) -> None:
    net, x = strided(), torch.randn(2, 4, 8, 9)
    result = fuse_convolutions(net, x)
    assert cudnn == []
    assert error_in_the_norm(run(result, x), run(net, x)) < FUSED["float32"]
    tried, used = cudnn
    assert not torch.equal(tried[0], x)
    x_given, weight, z, alpha, bias, *window = used
    assert torch.equal(x_given, x)
    assert torch.equal(weight, net.a.weight)
    assert torch.equal(bias, net.a.bias + net.b.bias)
    assert torch.equal(z, F.conv2d(x, net.b.weight, None, (2, 1)))
    assert (alpha, window) == (1.0, [[2, 1], [1, 4], [1, 2], 2])


def test_cudnn_pads_nothing_where_a_kernel_has_reflected(cudnn: list[tuple]) -> None:
    net = Net(lambda net, x: [F.relu(net.a(x))], padding_mode="reflect").eval()
    x = torch.randn(2, 3, 8, 9)
    result = fuse_convolutions(net, x)
    assert torch.equal(run(result, x), run(net, x))
    x_given, _, bias, *window = cudnn[-1]
    assert torch.equal(x_given, F.pad(x, (1, 1, 1, 1), mode="reflect"))
    assert torch.equal(bias, net.a.bias)
    assert window == [[1, 1], [0, 0], [1, 1], 1]


def without_bias(x, weight, bias, *window) -> Tensor:
    return cudnn_relu(x, weight, None, *window)


def without_engine(*_: object) -> Tensor:
    raise RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED")


@pytest.mark.parametrize("operator", [without_bias, without_engine])
def test_an_operator_that_errs_is_not_used(operator, cudnn: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = Net(lambda net, x: [F.relu(net.b(F.relu(net.a(x))))]).eval(), torch.randn(2, 3, 8, 9)
    result = fuse_convolutions(net, x)
    good = torch.ops.aten.cudnn_convolution_relu
    # One of the two alone errs: the other goes on.
    bad = lambda x, weight, *rest: (operator if weight is result.a.weight else good)(x, weight, *rest)  # noqa: E731
    monkeypatch.setattr(torch.ops.aten, "cudnn_convolution_relu", bad)
    for _ in range(2):
        assert torch.equal(run(result, x), run(net, x))
    assert (result.a.agrees, result.b.agrees) == (False, True)


def test_an_operator_is_tried_anew_on_another_device_or_in_another_dtype(cudnn: list[tuple]) -> None:
    net, x = strided(), torch.randn(2, 4, 8, 9)
    result = fuse_convolutions(net, x)
    run(result, x)
    run(result, x)
    assert (len(cudnn), result.a.agrees) == (3, True)
    assert copy.deepcopy(result).a.agrees is True
    result.bfloat16()
    assert result.a.agrees is None
    run(result, x.bfloat16())
    assert (len(cudnn), cudnn[-1][0].dtype, result.a.agrees) == (5, torch.bfloat16, True)


def test_an_operator_is_tried_at_every_shape_before_it_serves(
    cudnn: list[tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = strided(), torch.randn(2, 4, 8, 9)
    result = fuse_convolutions(net, x)
    run(result, x)
    calls = len(cudnn)
    run(result, x[:, :, :6])
    run(result, x[:, :, :6])
    assert len(cudnn) == calls + 3
    # A shape that cuDNN has no engine for costs no prediction.
    monkeypatch.setattr(torch.ops.aten, "cudnn_convolution_add_relu", without_engine)
    assert error_in_the_norm(run(result, x[:1]), run(net, x[:1])) < FUSED["float32"]
    assert result.a.agrees is False


def test_a_lack_of_memory_does_not_turn_the_operator_off(cudnn: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    def without_memory(*_: object) -> Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    result, x = fuse_convolutions(strided(), torch.randn(2, 4, 8, 9)), torch.randn(2, 4, 8, 9)
    good = torch.ops.aten.cudnn_convolution_add_relu
    monkeypatch.setattr(torch.ops.aten, "cudnn_convolution_add_relu", without_memory)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        run(result, x)
    monkeypatch.setattr(torch.ops.aten, "cudnn_convolution_add_relu", good)
    run(result, x)
    assert result.a.agrees is True


@pytest.mark.parametrize("switch", ["deterministic", "enabled"])
def test_cudnns_switches_are_heeded(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "is_acceptable", lambda x: switch != "enabled")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", switch == "deterministic")
    assert not ops.cudnn_may_serve(torch.zeros(1))
    x, weight = torch.randn(1, 2, 4, 4), torch.randn(3, 2, 3, 3)
    # On a CPU cuDNN's own operators would raise.
    ours = ops._convolution_relu(x, weight, None, None, [1, 1], [0, 0], [1, 1], 1)
    assert torch.equal(ours, twin.convolution_relu(x, weight, None, twin.Geometry()))


def test_an_image_with_nan_does_not_pass_for_a_good_one(cudnn: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    """Though cuDNN's ReLU makes 0 of it."""
    monkeypatch.setattr("fastmsflow.nn.feature_extractor.uses_cudnn", lambda backend, x: True)
    for name, function in (("cudnn_convolution_relu", cudnn_relu), ("cudnn_convolution_add_relu", cudnn_add_relu)):
        hiding = lambda *given, function=function: function(*given).nan_to_num(nan=0.0)  # noqa: E731
        monkeypatch.setattr(torch.ops.aten, name, hiding)
    result, given = fused(folded("resnet18")), images(3)
    result(given)
    given[1, 0, 5, 7], given[2, 1, 9, 9] = float("nan"), float("inf")
    *_, last = result(given)
    assert [bool(level.isnan().any()) for level in last] == [False, True, True]


@pytest.mark.parametrize("chosen", [None, "torch"])
def test_plain_pytorch_serves_on_a_cpu_and_where_it_is_asked_for(chosen) -> None:
    with backend.use(chosen) if chosen else nullcontext():
        assert not ops.uses_cudnn("auto", torch.zeros(1))


def compiled_is_taken_for_exported() -> bool:
    """Tells whether Dynamo takes every graph for an exported one, as torch 2.11's does: then none has the operators."""
    probe = torch.compile(lambda x: x + int(torch.compiler.is_exporting()), fullgraph=True, backend="eager")
    return bool(probe(torch.zeros(1)))


def test_a_fused_extractor_compiles_to_one_graph_that_keeps_the_operators(cudnn: list[tuple]) -> None:
    result, graphs = fused(folded("resnet18")), EagerAndRecordGraphs()
    given = images(1)
    expected = result(given, "triton")
    torch._dynamo.reset()
    ours = torch.compile(result, fullgraph=True, backend=graphs)(given, "triton")
    assert max(error_in_the_norm(*pair) for pair in zip(ours, expected, strict=True)) < FUSED["float32"]
    called = Counter(str(node.target) for node in graphs.graphs[0].graph.nodes)
    names = ("fastmsflow.convolution_relu.default", "fastmsflow.reflection_pad.default")
    assert [called[name] for name in names] == [0 if compiled_is_taken_for_exported() else 13, 13]


def test_an_exported_graph_holds_no_fused_operator(cudnn: list[tuple]) -> None:
    result, given = fused(folded("resnet18")), images(2)
    expected = result(given)
    assert all(module.agrees for module in found(result))
    program = torch.export.export(result, (given,))
    assert not [node for node in program.graph.nodes if "fastmsflow" in str(node.target)]
    features = program.module()(given)
    assert max(error_in_the_norm(*pair) for pair in zip(features, expected, strict=True)) < FUSED["float32"]
