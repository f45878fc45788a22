"""The convolution kernels, alone and fused, against their twins in float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastmsflow import InputError
from fastmsflow.kernels import configs
from fastmsflow.kernels.conv3x3_layer_norm import columns, fuses_layer_norm
from fastmsflow.ops import conv3x3 as plain
from fastmsflow.ops import conv3x3_coupling as coupling
from fastmsflow.ops import conv3x3_layer_norm as layer_norm
from fastmsflow.reference import conv3x3 as reference
from fastmsflow.reference import conv3x3_coupling as coupling_reference
from fastmsflow.reference import conv3x3_layer_norm as layer_norm_reference
from fastmsflow.reference.coupling import initial_global_scale
from fastmsflow.reference.coupling_spec import CouplingSpec, GlobalAffine
from tests.helpers.ops_parity import DEVICE, LAYOUTS, assert_not_finite_alike, assert_twins, examples, tensor
from tests.helpers.tolerances import SAME_SUMS

# (batch, inputs, outputs, height, width)
SHAPES = [
    (2, 12, 24, 6, 10),
    (1, 76, 130, 3, 5),
    (2, 16, 16, 8, 8),
    (1, 3, 6, 1, 1),
    (3, 20, 40, 1, 7),
    (1, 8, 10, 17, 19),
]
BOUNDED = {
    "concat": CouplingSpec.fusion(1.9, bounded=True),
    "likelihood": CouplingSpec.fusion(1.9, bounded=True, result="likelihood"),
}
HALVES = [torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("poisoned", "own_convolution")


@pytest.fixture
def own_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' own convolution, on whatever chip."""
    monkeypatch.setattr(configs, "own_convolution_is_faster", lambda *_: True)


def weights(inputs: int, outputs: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draws weights that keep the variance, as training does; in channels-last memory, a slice of wider ones."""
    wide = torch.randn(outputs, inputs + 4, 3, 3) / (9 * inputs) ** 0.5
    return wide.to(DEVICE, dtype, memory_format=torch.channels_last)[:, :inputs]


def vectors(count: int, length: int) -> list[Tensor]:
    return [torch.randn(length, device=DEVICE) for _ in range(count)]


def convolution(shape, dtype=torch.float32, layout="channels_last") -> list:
    torch.manual_seed(0)
    b, i, o, h, w = shape
    return [tensor((b, i, h, w), dtype, layout), weights(i, o, dtype), torch.randn(o, device=DEVICE).to(dtype)]


def normed(shape, dtype=torch.float32, layout="channels_last") -> list:
    _, _, o, h, w = shape
    x, weight, _ = convolution(shape, dtype, layout)
    return [x, weight, *vectors(2, o), tensor((1, o, h, w), dtype)]


def coupled(shape, dtype=torch.float32, layout="channels_last") -> list:
    b, _, o, h, w = shape
    hidden, weight, bias = convolution(shape, dtype, layout)
    global_scale, global_offset = vectors(2, o)
    perm = torch.randperm(o).to(DEVICE)
    x = [tensor((b, o // 2, h, w), dtype, layout) for _ in range(2)]
    affine = (global_scale + initial_global_scale(), global_offset)
    return [hidden, weight * 8, bias, *x, *affine, perm, perm.argsort()]


def fused(shape, dtype=torch.float32) -> list:
    b, _, o, h, w = shape
    hidden, weight, bias = convolution(shape, dtype)
    return [hidden, weight * 2, bias, None, tensor((b, o // 2, h, w), dtype)]


def bounded(shape, dtype=torch.float32) -> list:
    hidden, weight, bias, _, x = fused(shape, dtype)
    return [hidden, weight, bias, x.flip(1), x]


def flat(function, spec: CouplingSpec):
    """``function`` with a flat list of tensors: hidden, weight, bias, x1, x2 and, for a global affine, its four."""

    def call(hidden, weight, bias, x1, x2, *affine, with_log_det: bool = True, **options):
        names = ("scale", "offset", "perm", "inverse_perm")
        given = GlobalAffine(**dict(zip(names, affine, strict=True))) if affine else None
        wanted = replace(spec, with_log_det=with_log_det)
        return function(hidden, weight, bias, (x1, x2), spec=wanted, affine=given, **options)

    call.__name__ = function.__name__
    return call


def coupling_twins(spec: CouplingSpec) -> tuple:
    return flat(coupling.conv3x3_coupling, spec), flat(coupling_reference.conv3x3_coupling, spec)


def layer_norm_relu(x, weight, norm_weight, norm_bias, condition, backend: str = "triton"):
    return layer_norm.conv3x3_layer_norm_relu(x, weight, (norm_weight, norm_bias), condition, backend=backend)


def layer_norm_relu_twin(x, weight, norm_weight, norm_bias, condition):
    return layer_norm_reference.conv3x3_layer_norm_relu(x, weight, (norm_weight, norm_bias), condition)


OPERATIONS = {
    "conv": (plain.conv3x3, reference.conv3x3, convolution),
    "layer_norm": (layer_norm_relu, layer_norm_relu_twin, normed),
    "coupling": (*coupling_twins(CouplingSpec(clamp=1.9)), coupled),
    "fusion": (*coupling_twins(CouplingSpec.fusion(1.9)), fused),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_equals_float64(name: str, shape) -> None:
    ours, twin, arguments = OPERATIONS[name]
    assert_twins(ours, twin, arguments(shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", BOUNDED)
def test_bounded_fusion_coupling_equals_float64(name: str, shape) -> None:
    assert_twins(*coupling_twins(BOUNDED[name]), bounded(shape))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_half_precision_rounds_only_what_is_stored(name: str, dtype: torch.dtype) -> None:
    ours, twin, arguments = OPERATIONS[name]
    assert_twins(ours, twin, arguments((2, 12, 24, 6, 10), dtype), flips=name == "layer_norm")


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_tf32_rounds_only_operands(monkeypatch: pytest.MonkeyPatch, name: str, shape) -> None:
    # The interpreter multiplies them as they are: there the way to the kernels is tested, on a GPU the product.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    ours, twin, arguments = OPERATIONS[name]
    given = arguments(shape)
    assert plain.precision(given[0]) == "tf32"
    assert_twins(ours, twin, given, flips=name == "layer_norm")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["conv", "layer_norm", "coupling"])
def test_any_memory_layout(name: str, layout: str) -> None:
    ours, twin, arguments = OPERATIONS[name]
    assert_twins(ours, twin, arguments((2, 12, 24, 6, 10), layout=layout))


def test_weights_in_channels_first_memory() -> None:
    x, weight, bias = convolution((2, 12, 24, 6, 10))
    assert_twins(plain.conv3x3, reference.conv3x3, [x, weight.contiguous(), bias])


@pytest.mark.parametrize("name", OPERATIONS)
def test_inference_keeps_nothing_and_gives_the_same(name: str) -> None:
    ours, _, arguments = OPERATIONS[name]
    given = arguments((2, 12, 24, 6, 10))
    training = ours(*given, backend="triton")
    with torch.no_grad():
        torch.testing.assert_close(ours(*given, backend="triton"), training, **SAME_SUMS)


@pytest.mark.slow
@examples(10)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))
def test_any_shape_equals_float64(batch: int, inputs: int, half: int, height: int, width: int) -> None:
    assert_twins(plain.conv3x3, reference.conv3x3, convolution((batch, inputs, 2 * half, height, width)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_nan_and_inf_reach_what_they_reach_in_the_reference(name: str, bad: float) -> None:
    ours, twin, arguments = OPERATIONS[name]
    given = arguments((2, 12, 24, 6, 10))
    given[0] = given[0].clone()
    given[0][1, 3, 2, 4] = bad
    assert_not_finite_alike(ours, twin, given)


def test_a_bias_in_place_of_the_conditions_map() -> None:
    for shape in ((2, 12, 24, 6, 10), (1, 4, 352, 2, 3)):
        *given, condition = normed(shape)
        bias = condition[:, :, :1, :1].clone()
        assert_twins(layer_norm_relu, layer_norm_relu_twin, [*given, bias])


@pytest.mark.parametrize("own", [True, False], ids=["own convolution", "vendor's"])
@pytest.mark.parametrize("name", ["coupling", "fusion", *BOUNDED])
def test_without_log_det_the_same_comes_out(monkeypatch: pytest.MonkeyPatch, name: str, own: bool) -> None:
    monkeypatch.setattr(configs, "own_convolution_is_faster", lambda *_: own)
    if name in BOUNDED:
        ours, given = coupling_twins(BOUNDED[name])[0], bounded((2, 12, 24, 6, 10))
    else:
        (ours, _, arguments) = OPERATIONS[name]
        given = arguments((2, 12, 24, 6, 10))
    (expected, log_det), (out, none) = (ours(*given, with_log_det=wanted, backend="triton") for wanted in (True, False))
    assert none is None
    given[0].requires_grad_()
    assert ours(*given, with_log_det=False, backend="triton")[1] is None
    assert log_det is not None
    torch.testing.assert_close(out, expected, **SAME_SUMS)


def test_outputs_that_do_not_fit_the_halves_are_refused() -> None:
    hidden, weight, bias, *x = fused((2, 12, 8, 6, 10))
    spec = CouplingSpec.fusion(1.9)
    with pytest.raises(InputError, match="two each"):
        coupling.conv3x3_coupling(hidden, weight[:6], bias[:6], tuple(x), spec=spec, backend="triton")


def test_a_row_too_wide_for_a_program_is_normed_apart() -> None:
    assert [fuses_layer_norm(n) for n in (76, 192, 320, 576)] == [True, True, True, False]
    assert [columns(n) for n in (192, 320, 256, 76, 20)] == [(128, 64), (256, 64), (256, 0), (64, 16), (32, 0)]
    ours, twin, arguments = OPERATIONS["layer_norm"]
    assert_twins(ours, twin, arguments((1, 4, 352, 2, 3)))


def test_without_own_convolution_the_vendors_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "own_convolution_is_faster", lambda *_: False)
    for ours, twin, arguments in OPERATIONS.values():
        assert_twins(ours, twin, arguments((2, 12, 24, 6, 10)))


@pytest.mark.parametrize("vendors", ["conv3x3_input_gradient", "conv3x3_weight_gradient"])
def test_either_gradient_may_be_the_vendors(monkeypatch: pytest.MonkeyPatch, vendors: str) -> None:
    monkeypatch.setattr(configs, "own_convolution_is_faster", lambda kind, *_: kind != vendors)
    for ours, twin, arguments in OPERATIONS.values():
        assert_twins(ours, twin, arguments((2, 12, 24, 6, 10)))


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        ((2, 8, 3, 5), (6, 7, 3, 3), (6,), "weight"),
        ((2, 8, 3, 5), (6, 8, 1, 1), (6,), "weight"),
        ((2, 8, 3, 5), (6, 8, 3, 3), (5,), "bias"),
    ],
)
def test_what_does_not_fit_is_refused(x, weight, bias, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plain.conv3x3(torch.zeros(x), torch.zeros(weight), torch.zeros(bias))


def test_operands_of_two_dtypes_are_refused() -> None:
    x, weight, bias = convolution((2, 12, 24, 6, 10))
    with pytest.raises(InputError, match="autocast"):
        plain.conv3x3(x, weight.half(), bias, backend="triton")
