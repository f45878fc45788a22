"""The coupling kernels against their twins in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmsflow import InputError
from fastmsflow.kernels import coupling as kernels
from fastmsflow.ops import coupling as ops
from fastmsflow.reference import coupling as reference
from fastmsflow.reference.clamp_forms import CLAMP_FORMS, soft_clamp
from fastmsflow.reference.coupling_spec import CouplingSpec, GlobalAffine
from tests.helpers.ops_parity import DEVICE, LAYOUTS, assert_not_finite_alike, assert_twins, examples, flatten, tensor
from tests.helpers.tolerances import OPERATION_CLOSE

SHAPES = [(2, 16, 8, 8), (1, 24, 12, 20), (3, 40, 6, 10), (2, 112, 3, 5), (1, 2, 1, 1), (2, 130, 1, 7)]
CONCAT = CouplingSpec.fusion(1.9, bounded=True)
LIKELIHOOD = CouplingSpec.fusion(1.9, bounded=True, result="likelihood")
BOUNDED = {"concat": CONCAT, "likelihood": LIKELIHOOD}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("poisoned")


def affine(channels: int) -> list:
    """Global scale and offset, a permutation and its inverse."""
    global_scale = reference.initial_global_scale() + torch.randn(channels, device=DEVICE)
    perm = torch.randperm(channels).to(DEVICE)
    return [global_scale, torch.randn(channels, device=DEVICE), perm, perm.argsort()]


def flat(function, spec: CouplingSpec):
    """``function`` with a flat list of tensors: x1, x2, raw, bias (inverse: z, raw), then a global affine's four."""

    def call(*tensors, **options):
        if function.__name__ == "coupling_inverse":
            z, raw, *rest = tensors
            return function(z, raw, spec=spec, affine=global_affine(*rest) if rest else None, **options)
        x1, x2, raw, bias, *rest = tensors
        return function((x1, x2), raw, bias, spec=spec, affine=global_affine(*rest) if rest else None, **options)

    call.__name__ = function.__name__
    return call


def global_affine(scale, offset, perm, inverse_perm) -> GlobalAffine:
    return GlobalAffine(scale=scale, offset=offset, perm=perm, inverse_perm=inverse_perm)


def twins(name: str, spec: CouplingSpec) -> tuple:
    return flat(getattr(ops, name), spec), flat(getattr(reference, name), spec)


def block(shape, dtype=torch.float32, layout="channels_last", bias: bool = True) -> list:
    torch.manual_seed(0)
    b, c, h, w = shape
    halves = [tensor((b, c // 2, h, w), dtype, layout) for _ in range(2)]
    raw = tensor(shape, dtype, layout, scale=8.0)
    return [*halves, raw, torch.randn(c, device=DEVICE) if bias else None, *affine(c)]


def inverse_block(shape, dtype=torch.float32, layout="channels_last") -> list:
    torch.manual_seed(0)
    return [tensor(shape, dtype, layout), tensor(shape, dtype, layout, scale=8.0), *affine(shape[1])]


BLOCKS = {"coupling": block, "coupling_inverse": inverse_block}


def fusion(shape, dtype=torch.float32, layout="channels_last") -> list:
    torch.manual_seed(0)
    b, c, h, w = shape
    x = tensor((b, c // 2, h, w), dtype, layout)
    return [x, tensor(shape, dtype, layout, scale=3.0), torch.randn(c, device=DEVICE)]


def fusion_inverse(shape) -> list:
    return fusion(shape)[:2]


def assert_fusion_twins(name: str, arguments: list, spec: CouplingSpec) -> None:
    """Fails unless a coupling across levels equals its twin; without an x1 in forward direction."""
    given = arguments if name == "coupling_inverse" else [None, *arguments]
    assert_twins(*twins(name, spec), given)


FUSION = {"coupling": fusion, "coupling_inverse": fusion_inverse}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", ["tanh", "scaled_tanh"])
@pytest.mark.parametrize("name", BLOCKS)
def test_block_equals_float64(name: str, form: str, shape) -> None:
    assert_twins(*twins(name, CouplingSpec(clamp=1.9, form=form)), BLOCKS[name](shape))


@pytest.mark.parametrize("result", ["halves", "concat"])
def test_without_log_det_the_same_comes_out_whole_or_in_halves(result: str) -> None:
    given = block((2, 40, 6, 10), bias=False)
    expected, log_det = flat(ops.coupling, CouplingSpec(clamp=1.9))(*given, backend="triton")
    spec = CouplingSpec(clamp=1.9, result=result, with_log_det=False)
    z, none = flat(ops.coupling, spec)(*given, backend="triton")
    assert none is None
    assert log_det is not None
    # Equal to the bit: it is the same kernel, which stores to other places.
    assert all(map(torch.equal, z[0].chunk(2, dim=1) if result == "concat" else z, expected))
    assert len(z) == (1 if result == "concat" else 2)


def test_halves_are_compact_for_the_next_convolution() -> None:
    z, _ = flat(ops.coupling, CouplingSpec(clamp=1.9))(*block((2, 40, 6, 10)), backend="triton")
    assert all(half.is_contiguous(memory_format=torch.channels_last) for half in z)


def test_halves_of_one_tensor_are_read_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, *rest = block((2, 40, 6, 10))
    x1, x2 = tensor((2, 40, 6, 10), torch.float32).chunk(2, dim=1)
    monkeypatch.setattr(torch.Tensor, "contiguous", None)
    assert_twins(*twins("coupling", CouplingSpec(clamp=1.9)), [x1, x2, *rest], gradients=False)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FUSION)
def test_fusion_coupling_equals_float64(name: str, shape) -> None:
    assert_fusion_twins(name, FUSION[name](shape), CouplingSpec.fusion(1.9))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", BOUNDED)
def test_bounded_fusion_coupling_equals_float64(name: str, shape) -> None:
    x, *rest = fusion(shape)
    assert_twins(*twins("coupling", BOUNDED[name]), [x.flip(1), x, *rest])
    assert_twins(*twins("coupling", BOUNDED[name]), [x.flip(1), x, rest[0], None])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_half_precision_rounds_only_what_is_stored(name: str, dtype: torch.dtype) -> None:
    assert_twins(*twins(name, CouplingSpec(clamp=1.9)), BLOCKS[name]((2, 24, 6, 10), dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BLOCKS)
def test_any_memory_layout(name: str, layout: str) -> None:
    assert_twins(*twins(name, CouplingSpec(clamp=1.9)), BLOCKS[name]((2, 24, 6, 10), layout=layout))


def test_mixed_precision_of_autocast() -> None:
    x1, x2, raw, *fixed = block((2, 24, 6, 10))
    ours, twin = twins("coupling", CouplingSpec(clamp=1.9))
    z, _ = ours(x1, x2, raw.bfloat16(), *fixed, backend="triton")
    expected, _ = twin(x1.double(), x2.double(), raw.bfloat16().double(), *fixed)
    assert [half.dtype for half in z] == [torch.float32, torch.float32]
    torch.testing.assert_close([half.double() for half in z], expected, **OPERATION_CLOSE)


def test_output_is_bounded_to_a_million_and_passes_no_gradient_there() -> None:
    x, *rest = fusion((1, 16, 3, 5))
    x[:, ::2] *= 1e7
    for spec in BOUNDED.values():
        assert_twins(*twins("coupling", spec), [x.flip(1), x, *rest])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("place", [0, 1, 2], ids=["x1", "x2", "raw"])
@pytest.mark.parametrize("name", BLOCKS)
def test_nan_and_inf_come_out_where_the_reference_has_them(name: str, place: int, bad: float) -> None:
    arguments = BLOCKS[name]((2, 24, 3, 5))
    place = min(place, 1) if name == "coupling_inverse" else place
    arguments[place][1, 3, 2, 4] = arguments[place][0, 10, 0, 1] = bad
    ours, twin = twins(name, CouplingSpec(clamp=1.9))
    for a, b in zip(flatten(ours(*arguments, backend="triton")), flatten(twin(*arguments)), strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.isinf(), b.isinf())
    x, *rest = fusion((2, 24, 3, 5))
    x[0, 1, 1, 1] = bad
    for spec in BOUNDED.values():
        assert_not_finite_alike(*twins("coupling", spec), [x, x, *rest])


@pytest.mark.slow
@examples(25)
@given(
    batch=st.integers(1, 4),
    half=st.integers(1, 70),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_any_shape_equals_float64(batch: int, half: int, height: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    assert_twins(*twins("coupling", CouplingSpec(clamp=1.9)), block((batch, 2 * half, height, width)))


@pytest.mark.parametrize(
    ("x1", "x2", "raw", "message"),
    [
        ((2, 4, 3, 5), (2, 4, 3, 5), (2, 8, 3, 4), "a grid"),
        ((2, 4, 3, 5), (2, 4, 3, 5), (1, 8, 3, 5), "a batch of 1"),
        ((2, 4, 3, 5), (2, 4, 3, 5), (2, 7, 3, 5), "7 channels"),
        ((2, 3, 3, 5), (2, 4, 3, 5), (2, 8, 3, 5), "halves"),
    ],
)
def test_what_does_not_fit_is_refused(x1, x2, raw, message: str) -> None:
    tensors = (torch.zeros(shape, device=DEVICE) for shape in (x1, x2, raw))
    with pytest.raises(InputError, match=message):
        flat(ops.coupling, CouplingSpec(clamp=1.9))(*tensors, None, *affine(8), backend="torch")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_an_unknown_clamp_form_is_refused_by_every_operation(backend: str) -> None:
    x1, x2, raw, *_ = block((2, 8, 3, 5))
    spec = CouplingSpec(clamp=1.9, form="sigmoid")
    calls = [
        lambda: ops.coupling((x1, x2), raw, spec=spec, backend=backend),
        lambda: ops.coupling_inverse(x2, raw, spec=spec, backend=backend),
        lambda: reference.coupling((x1, x2), raw, spec=spec),
        lambda: reference.coupling_inverse(x2, raw, spec=spec),
        lambda: soft_clamp(raw, 1.9, "sigmoid"),
    ]
    for call in calls:
        with pytest.raises(InputError, match=r"'sigmoid' is not known; choose one of tanh, scaled_tanh, atan"):
            call()


def test_an_unknown_clamp_form_does_not_compile() -> None:
    x1, x2, raw, *_ = block((2, 8, 3, 5))
    settings = {"raw_scale": 1.0, "clamp": 1.9, "limit": None, "inverse": False, "result": "halves"}
    nothing = dict.fromkeys(("global_scale", "global_offset", "index"))
    with pytest.raises(Exception, match="unknown form of the soft clamp"):
        kernels.coupling(x1, x2, raw, None, **nothing, **settings, form=len(CLAMP_FORMS), with_log_det=True)


@pytest.mark.parametrize("form", CLAMP_FORMS)
def test_every_registered_clamp_form_is_the_kernels_form_of_its_number(form: str) -> None:
    assert_twins(*twins("coupling", CouplingSpec(clamp=1.9, form=form)), block((2, 24, 3, 5)))
