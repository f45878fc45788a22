"""The flow itself: invertibility, log-det, gradients, precisions, and what it refuses."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmsflow import InputError, MultiScaleFlow, backend
from fastmsflow.nn.positional_encoding import positional_encoding_2d
from fastmsflow.reference.likelihood import log_likelihood_maps, negative_log_likelihood
from tests.helpers.ops_parity import DEVICE
from tests.helpers.tolerances import AUTOCAST, JACOBIAN_FLOAT64

GRIDS = ((6, 10), (3, 5), (2, 3))


def small_flow(channels=(8, 12, 6), condition=(8, 4, 8), blocks=(1, 2, 2), **options) -> MultiScaleFlow:
    """A flow whose every parameter matters: nothing at its start value of 0 or 1."""
    torch.manual_seed(1)
    flow = MultiScaleFlow(channels, condition, blocks, **options)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return flow


def inputs(channels=(8, 12, 6), batch: int = 2, dtype=torch.float64, grids=GRIDS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(batch, c, *g, generator=generator, dtype=dtype) for c, g in zip(channels, grids, strict=True)]


@given(
    channels=st.lists(st.integers(1, 8).map(lambda n: 2 * n), min_size=3, max_size=3),
    condition=st.lists(st.integers(1, 3).map(lambda n: 4 * n), min_size=3, max_size=3),
    blocks=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    batch=st.integers(1, 3),
    form=st.sampled_from(["tanh", "scaled_tanh"]),
)
@settings(max_examples=20, deadline=None)
def test_any_shape_goes_forward_and_back(channels, condition, blocks, grid, batch, form) -> None:
    if sum(channels) // 2 < 4:
        return
    flow = small_flow(channels, condition, blocks, clamp_form=form).double()
    grids = [(grid[0] * 4, grid[1] * 4), (grid[0] * 2, grid[1] * 2), grid]
    x = inputs(channels, batch, grids=grids)
    z, log_det = flow(x)
    back, log_det_back = flow.inverse(z)
    assert [level.shape for level in z] == [level.shape for level in x]
    for a, b in zip(back, x, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(log_det_back, -log_det, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["tanh", "scaled_tanh"])
def test_log_det_is_that_of_autograds_jacobian(form: str) -> None:
    channels, grids = (4, 4, 6), ((4, 4), (2, 2), (1, 2))
    flow = small_flow(channels, (4, 4, 4), (2, 1, 2), clamp_form=form).double()
    x = inputs(channels, 1, grids=grids)
    sizes = [level.numel() for level in x]

    def flat(vector: torch.Tensor) -> torch.Tensor:
        levels = [part.view_as(level) for part, level in zip(vector.split(sizes), x, strict=True)]
        return torch.cat([level.flatten() for level in flow(levels)[0]])

    start = torch.cat([level.flatten() for level in x])
    jacobian = torch.autograd.functional.jacobian(flat, start)
    assert abs(torch.linalg.slogdet(jacobian)[1] - flow(x)[1].item()) < JACOBIAN_FLOAT64


def test_gradients_equal_finite_differences() -> None:
    channels, grids = (4, 2, 2), ((2, 3), (1, 2), (1, 1))
    flow = small_flow(channels, (4, 4, 4), (1, 1, 1)).double()
    x = [level.requires_grad_() for level in inputs(channels, 1, grids=grids)]
    names, parameters = zip(*flow.named_parameters(), strict=True)
    assert torch.autograd.gradcheck(lambda *levels: flow.nll(levels), x)

    def of_parameters(*values: torch.Tensor) -> torch.Tensor:
        z, log_det = torch.func.functional_call(flow, dict(zip(names, values, strict=True)), (x,))
        return negative_log_likelihood(log_likelihood_maps(z), channels, log_det)

    assert torch.autograd.gradcheck(of_parameters, parameters, fast_mode=True)


def test_nll_is_half_the_squared_norm_of_the_latents_less_log_det() -> None:
    flow, x = small_flow().double(), inputs()
    z, log_det = flow(x)
    expected = 0.5 * sum(level.square().sum(dim=(1, 2, 3)) for level in z) - log_det
    torch.testing.assert_close(flow.nll(x), expected, rtol=1e-12, atol=0)


def test_a_loaded_permutation_is_inverted_anew() -> None:
    torch.manual_seed(1)
    flow, other = small_flow(), small_flow()
    block, loaded = flow.parallel_flows[0].blocks[0], other.parallel_flows[0].blocks[0]
    loaded.perm.copy_(loaded.perm.roll(1))
    flow.load_state_dict(other.state_dict())
    assert torch.equal(block.perm[block.inverse_perm], torch.arange(len(block.perm)))
    assert "inverse_perm" not in "".join(flow.state_dict())


def test_an_order_is_applied_as_if_to_the_output() -> None:
    flow = small_flow().double()
    parallel, code, x = flow.parallel_flows[1], flow.position_codes[1], inputs()[1]
    order = torch.randperm(x.shape[1])
    plain, ordered = parallel(x, code(x))[0], parallel(x, code(x), output_perm=order)[0]
    assert torch.equal(ordered, plain[:, order])
    torch.testing.assert_close(parallel.inverse(ordered, code(x), output_perm=order)[0], x, rtol=1e-9, atol=1e-9)


def test_condition_map_is_computed_once_for_given_weights(monkeypatch) -> None:
    flow = small_flow().eval()
    flow.backend = "torch"
    x = inputs(dtype=torch.float32)
    with torch.no_grad():
        first = flow(x)[0]
        calls = []
        convolve = torch.nn.functional.conv2d
        monkeypatch.setattr(
            torch.nn.functional, "conv2d", lambda *a, **k: calls.append(a[0].shape) or convolve(*a, **k)
        )
        second = flow(x)[0]
    blocks = sum(flow.blocks)
    fusion = 2 * (2 + len(flow.channels))
    assert len(calls) == 2 * blocks + fusion  # none left for the condition
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_condition_map_follows_the_weights() -> None:
    flow = small_flow().eval()
    x = inputs(dtype=torch.float32)
    with torch.no_grad():
        before = flow(x)[0]
        for block in flow.parallel_flows[0].blocks:
            block.subnet.conv1.weight.mul_(1.5)
        after = flow(x)[0]
    with torch.enable_grad():
        fresh = flow(x)[0]
    assert not torch.allclose(before[0], after[0])
    torch.testing.assert_close(after, [level.detach() for level in fresh])


def test_evaluation_in_inference_mode_leaves_training_possible() -> None:
    flow = small_flow()
    x = inputs(dtype=torch.float32)
    with torch.inference_mode():
        flow.eval()(x)
    flow.train().nll(x).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_stays_near_float32(dtype: torch.dtype) -> None:
    flow = small_flow()
    x = inputs(dtype=torch.float32)
    z, log_det = flow(x)
    with torch.autocast("cpu", dtype):
        z_low, log_det_low = flow(x)
        loss = flow.nll(x).mean()
    loss.backward()
    tolerance = AUTOCAST[str(dtype)[6:]]
    assert log_det_low.dtype == torch.float32
    assert loss.dtype == torch.float32
    for a, b in zip(z_low, z, strict=True):
        assert (a.float() - b).abs().max() / b.abs().max() < tolerance
    assert ((log_det_low - log_det).abs() / sum(level[0].numel() for level in x)).max() < tolerance
    assert all(p.grad.isfinite().all() for p in flow.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_sums_of_a_half_precision_model_are_float32(dtype: torch.dtype) -> None:
    flow = small_flow().to(dtype)
    z, log_det = flow(inputs(dtype=dtype))
    assert z[0].dtype == dtype
    assert log_det.dtype == torch.float32
    assert flow.nll(inputs(dtype=dtype)).dtype == torch.float32


def test_channels_last_and_strided_inputs_give_the_same() -> None:
    flow = small_flow().double()
    x = inputs()
    expected, log_det = flow(x)
    for variant in (
        [level.contiguous(memory_format=torch.channels_last) for level in x],
        [torch.stack([level, level], dim=-1)[..., 0] for level in x],
    ):
        z, log_det_variant = flow(variant)
        torch.testing.assert_close(z, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(log_det_variant, log_det, rtol=1e-12, atol=1e-12)


def test_a_copy_and_a_pickle_compute_the_same() -> None:
    flow = small_flow().double().eval()
    x = inputs()
    with torch.no_grad():
        expected = flow(x)
        for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
            torch.testing.assert_close(other(x), expected, rtol=0, atol=0)


def test_position_code_has_the_published_channels() -> None:
    code = positional_encoding_2d(8, 3, 5, dtype=torch.float64, device="cpu")[0]
    y, x, k = 2, 4, 1
    frequency = 1e4 ** (-2 * k / 4)
    expected = torch.tensor([x * frequency, y * frequency], dtype=torch.float64)
    torch.testing.assert_close(code[[2 * k, 4 + 2 * k], y, x], expected.sin())
    torch.testing.assert_close(code[[2 * k + 1, 5 + 2 * k], y, x], expected.cos())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": (8, 7, 6)}, "even"),
        ({"condition": (8, 6, 8)}, "multiple of 4"),
        ({"blocks": (1, 2)}, "same number of levels"),
        ({"blocks": (1, 0, 2)}, "blocks is 0"),
        ({"clamp_form": "sigmoid"}, "clamp_form"),
        ({"backend": "cudnn"}, "backend"),
    ],
)
def test_a_flow_that_cannot_be_is_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        small_flow(**options)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (lambda x: x[:2], "2 levels given"),
        (lambda x: [x[0], x[1][:, :4], x[2]], r"level 1 is \(2, 4, 3, 5\)"),
        (lambda x: [x[0], x[1], x[2][:1]], "level 2"),
        (lambda x: [x[0].int(), x[1], x[2]], "floating"),
    ],
)
def test_features_that_do_not_fit_are_refused(levels, message: str) -> None:
    with pytest.raises(InputError, match=message):
        small_flow().double()(levels(inputs()))


def test_nan_in_gives_nan_out_not_an_error() -> None:
    flow = small_flow().double()
    x = inputs()
    x[0][0, 0, 0, 0] = float("nan")
    nll = flow.nll(x)
    assert nll[0].isnan()
    assert nll[1].isfinite()


def test_a_tiles_code_is_its_part_of_the_images_code() -> None:
    whole = positional_encoding_2d(8, 9, 20, dtype=torch.float64, device="cpu")
    # Tiles of 3x5: their places are counted in heights and widths of a tile.
    places = torch.tensor([[0.0, 0.0], [1.0, 2.0], [2.0, 3.0], [4 / 3, 0.2]])
    tiles = positional_encoding_2d(8, 3, 5, dtype=torch.float64, device="cpu", offsets=places)
    for tile, (top, left) in zip(tiles, ((0, 0), (3, 10), (6, 15), (4, 1)), strict=True):
        torch.testing.assert_close(tile, whole[0, :, top : top + 3, left : left + 5], rtol=0, atol=1e-6)


def test_a_flow_at_offsets_is_conditioned_on_each_images_own_place() -> None:
    flow, x = small_flow().double().eval(), [level.double() for level in inputs()]
    batch = len(x[0])
    offsets = torch.arange(2.0 * batch, dtype=torch.float64).view(batch, 2) / 3
    z, log_det = flow(x, offsets)
    back, inverse_log_det = flow.inverse(z, offsets)
    for level, pixels in zip(back, x, strict=True):
        torch.testing.assert_close(level, pixels, rtol=0, atol=1e-10)
    torch.testing.assert_close(inverse_log_det, -log_det)
    for number in range(batch):
        alone, alone_log_det = flow([level[number, None] for level in x], offsets[number, None])
        torch.testing.assert_close(alone_log_det[0], log_det[number])
        for one, level in zip(alone, z, strict=True):
            torch.testing.assert_close(one[0], level[number])
    at_origin, _ = flow(x, torch.zeros(batch, 2))
    for one, other in zip(at_origin, flow(x)[0], strict=True):
        torch.testing.assert_close(one, other)
    assert (flow.nll(x, offsets) - flow.nll(x)).abs().min() > 1e-6


def test_kernels_compute_a_flow_at_offsets_as_pytorch_does() -> None:
    flow, x = small_flow().to(DEVICE).eval(), [level.float().to(DEVICE) for level in inputs()]
    offsets = torch.arange(2.0 * len(x[0]), device=DEVICE).view(-1, 2) / 3
    with torch.no_grad(), backend.use("torch"):
        expected, expected_log_det = flow.log_likelihood_maps(x, offsets)
    with torch.no_grad(), backend.use("triton"):
        found, log_det = flow.log_likelihood_maps(x, offsets)
    torch.testing.assert_close(log_det, expected_log_det, rtol=1e-4, atol=1e-4)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_gradients_at_offsets_are_those_of_each_image_alone() -> None:
    flow, x = small_flow().double(), [level.double() for level in inputs()]
    offsets = torch.arange(2.0 * len(x[0])).view(-1, 2) / 3
    flow.nll(x, offsets).sum().backward()
    together = [parameter.grad.clone() for parameter in flow.parameters() if parameter.grad is not None]
    flow.zero_grad()
    for number, place in enumerate(offsets):
        flow.nll([level[number, None] for level in x], place[None]).sum().backward()
    apart = [parameter.grad for parameter in flow.parameters() if parameter.grad is not None]
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("offsets", [torch.zeros(1, 2), torch.zeros(2), torch.zeros(2, 3)])
def test_offsets_of_another_shape_are_refused(offsets: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"^offsets are .*; give \(\d+, 2\) on cpu, y and x of an image$"):
        small_flow().eval()(inputs(), offsets)
