"""The whole flow by the kernels, and which backend serves when."""

import os
import subprocess
import warnings
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor, library

from fastmsflow import InputError, MultiScaleFlow, UnavailableError, backend
from fastmsflow.kernels import configs
from fastmsflow.ops import (
    conv3x3,
    conv3x3_coupling,
    conv3x3_layer_norm,
    convolution_relu,
    coupling,
    fusion,
    image_score,
    layer_norm,
    likelihood,
    reflection_pad,
    score_map,
)
from fastmsflow.scoring import score_log_likelihoods
from tests.helpers.error_log import assert_within
from tests.helpers.ops_parity import DEVICE
from tests.helpers.parity import NAMES, allowed, golden_errors, golden_gradients, golden_trajectory
from tests.helpers.tolerances import (
    AUTOCAST,
    FLOW_CLOSE,
    GOLDEN_FLOAT32,
    GOLDEN_LOG_DET_PER_ELEMENT,
    GOLDEN_TRAJECTORY,
    OPERATION_CLOSE,
    SAME_SUMS,
)

pytestmark = pytest.mark.slow

each_recording = pytest.mark.parametrize("name", NAMES)


# The interpreter, where the kernels' own is what is to be tested, is too slow for both.
@pytest.fixture(params=["own", "vendor's"] if DEVICE != "cpu" else ["own"])
def convolution(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "own_convolution_is_faster", lambda *_: request.param == "own")


@each_recording
def test_recorded_outputs_are_reproduced_by_the_kernels(name: str, convolution: None) -> None:
    with backend.use("triton"):
        errors = golden_errors(name, torch.float32)
    per_element = "parallel log-det, nats an element"
    bounds = dict.fromkeys(errors, GOLDEN_FLOAT32) | {per_element: GOLDEN_LOG_DET_PER_ELEMENT}
    assert_within((what, error, allowed(bounds[what])) for what, error in errors.items())


@each_recording
def test_recorded_gradients_are_reproduced_by_the_kernels(name: str, convolution: None) -> None:
    with backend.use("triton"):
        errors = golden_gradients(name, torch.float32)
    assert_within((what, error, allowed(GOLDEN_FLOAT32)) for what, error in errors.items())


def test_the_first_recorded_training_steps_are_reproduced_by_the_kernels(convolution: None) -> None:
    bound = allowed(GOLDEN_TRAJECTORY)
    # The interpreter takes ten seconds a step.
    with backend.use("triton"):
        for step, (loss_error, norm_error) in enumerate(islice(golden_trajectory("odd", torch.float32), 2)):
            assert_within([(f"loss, step {step}", loss_error, bound), (f"norm, step {step}", norm_error, bound)])


def small(name: str = "auto") -> tuple[MultiScaleFlow, list[Tensor]]:
    torch.manual_seed(0)
    flow = MultiScaleFlow((8, 12, 16), (8, 8, 8), (1, 2, 1), backend=name).to(DEVICE)
    grids = ((6, 10), (3, 5), (2, 3))
    return flow, [torch.randn(2, c, *grid, device=DEVICE) for c, grid in zip(flow.channels, grids, strict=True)]


def gradients(flow: MultiScaleFlow, x: list[Tensor]) -> list[Tensor]:
    x = [level.detach().requires_grad_() for level in x]
    flow.zero_grad()
    flow.nll(x).mean().backward()
    return [*(p.grad.clone() for p in flow.parameters()), *(level.grad for level in x)]


def test_inverse_undoes_forward_by_the_kernels() -> None:
    flow, x = small("triton")
    z, log_det = flow(x)
    back, log_det_back = flow.inverse(z)
    torch.testing.assert_close(back, x, **OPERATION_CLOSE)
    torch.testing.assert_close(log_det_back, -log_det, **FLOW_CLOSE)


def test_gradients_through_the_inverse_equal_the_references() -> None:
    results = []
    for name in ("triton", "torch"):
        flow, z = small(name)
        z = [level.requires_grad_() for level in z]
        x, log_det = flow.inverse(z)
        (sum(level.square().sum() for level in x) + log_det.sum()).backward()
        results.append([p.grad for p in (*flow.parameters(), *z)])
    torch.testing.assert_close(*results, **FLOW_CLOSE)


def test_gradients_around_the_vendors_convolutions_equal_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "own_convolution_is_faster", lambda *_: False)
    ours, theirs = (gradients(*small(name)) for name in ("triton", "torch"))
    torch.testing.assert_close(ours, theirs, **FLOW_CLOSE)


def test_two_runs_agree_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    # A vendor's gradients may be summed in any order.
    monkeypatch.setattr(configs, "own_convolution_is_faster", lambda *_: True)
    torch.manual_seed(0)
    flow = MultiScaleFlow((8, 12), (8, 8), (1, 1), backend="triton").to(DEVICE)
    x = [torch.randn(2, 8, 6, 10, device=DEVICE), torch.randn(2, 12, 3, 5, device=DEVICE)]
    first, second = gradients(flow, x), gradients(flow, x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_stays_near_float32_by_the_kernels(dtype: torch.dtype) -> None:
    flow, x = small("triton")
    exact = flow.nll(x)
    with torch.autocast(DEVICE, dtype):
        rounded = flow.nll(x)
    assert rounded.dtype == torch.float32
    assert ((rounded - exact).abs() / exact.abs()).max() < AUTOCAST[str(dtype)[6:]]


def test_forward_and_backward_compile_to_one_graph() -> None:
    torch.manual_seed(0)
    flow = MultiScaleFlow((8, 12), (8, 8), (1, 1), backend="triton").to(DEVICE)
    x = [torch.randn(2, 8, 3, 5, device=DEVICE), torch.randn(2, 12, 2, 3, device=DEVICE)]
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lru_cache.*")
        loss = torch.compile(flow.nll, fullgraph=True)(x).mean()
    ours = torch.autograd.grad(loss, list(flow.parameters()))
    theirs = torch.autograd.grad(flow.nll(x).mean(), list(flow.parameters()))
    torch.testing.assert_close(ours, theirs, **FLOW_CLOSE)


def samples() -> dict[str, tuple]:
    torch.manual_seed(0)
    x, raw, vector = (torch.randn(s, device=DEVICE) for s in ((2, 8, 3, 5), (2, 8, 3, 5), (8,)))
    perm = torch.randperm(8).to(DEVICE)
    pixels, logp = torch.rand(30, device=DEVICE), [torch.randn(2, 3, 5, device=DEVICE)]
    halves, log_det = (x[:, :4], x[:, 4:], raw), x[:, 0, 0, 0]
    within, options = (vector, vector + 10, vector, perm), (0.1, 1.9, "tanh", None)
    across = (None, None, None, 1.0, 1.9, "atan", 1e6, False)
    weight = torch.randn(8, 8, 3, 3, device=DEVICE)
    window = ([2, 1], [1, 1], [1, 1], 2)
    backward = coupling._coupling_backward
    return {
        "coupling": (coupling._coupling, (*halves, *within, *options, False, "halves", True)),
        "coupling, concat": (coupling._coupling, (*halves, *within, *options, False, "concat", False)),
        "coupling, permutation alone": (
            coupling._coupling,
            (x[:, :4], x[:, 4:], None, None, *within[1:], *options, False, "halves", True),
        ),
        "coupling, inverse": (coupling._coupling, (*halves, *within, *options, True, "concat", True)),
        "coupling, across": (
            coupling._coupling,
            (None, *halves[1:], vector, *across[:-2], None, False, "concat", True),
        ),
        "coupling, likelihood": (coupling._coupling, (*halves, vector, *across, "likelihood", True)),
        "coupling, likelihood, backward": (
            backward,
            (logp, log_det, *halves, vector, *across[1:], "likelihood"),
        ),
        "coupling, backward": (
            backward,
            (list(halves[:2]), log_det, *halves, vector, vector + 10, perm, *options, False, "halves"),
        ),
        "layer norm": (layer_norm._layer_norm_relu, (x, x[:1], vector, vector, 1e-5)),
        "layer norm, backward": (
            layer_norm._layer_norm_relu_backward,
            (raw, x, x[:1], vector, vector, pixels, pixels),
        ),
        "likelihood": (likelihood._log_likelihood_maps, ([x],)),
        "likelihood, backward": (likelihood._log_likelihood_maps_backward, (logp, [x])),
        "convolution": (conv3x3._conv3x3, (x, weight, vector)),
        "convolution, input gradient": (conv3x3._input_gradient, (x, weight)),
        "convolution, weight gradient": (conv3x3._weight_gradient, (x, raw)),
        "convolution and layer norm": (
            conv3x3_layer_norm._conv_layer_norm_relu,
            (x, weight, x[:1], vector, vector, 1e-5, True),
        ),
        "convolution and coupling": (
            conv3x3_coupling._conv_coupling,
            (x, weight, vector, None, x[:, 4:], *options, "concat", True, False),
        ),
        "convolution, coupling and likelihood": (
            conv3x3_coupling._conv_coupling,
            (x, weight, vector, *halves[:2], 1.0, 1.9, "atan", 1e6, "likelihood", True, True),
        ),
        "pool": (fusion._pool, ([x, x[:, :, :2, :3]],)),
        "pool, backward": (fusion._pool_backward, (torch.cat((x, x), dim=1)[:, :, :2, :3], [x, x[:, :, :2, :3]])),
        "upsample": (fusion._upsample, (x[:, :, :2, :3], vector, [x])),
        "upsample, backward": (fusion._upsample_backward, ([x], x[:, :, :2, :3], vector)),
        "reflection": (reflection_pad._reflection_pad, (x, [3, 1, 0, 2])),
        "convolution and ReLU": (convolution_relu._convolution_relu, (x, weight[:, :4], vector, None, *window)),
        "convolution, addition and ReLU": (
            convolution_relu._convolution_relu,
            (x, weight[:, :4], None, x[:, :, :2].contiguous(), *window),
        ),
        "score maps": (score_map._score_maps, (logp, [6, 10])),
        "image scores": (image_score._image_scores, (-logp[0].abs(), 2)),
    }


@pytest.mark.parametrize("name", samples())
def test_operators_are_well_registered(name: str) -> None:
    operator, arguments = samples()[name]
    library.opcheck(operator, arguments)


def test_scores_by_the_kernels_equal_the_references() -> None:
    flow, x = small()
    with torch.no_grad():
        logp, _ = flow.log_likelihood_maps(x)
    ours, theirs = (score_log_likelihoods(logp, (24, 40), backend=b) for b in ("triton", "torch"))
    torch.testing.assert_close(ours, theirs, **OPERATION_CLOSE)


def test_scores_log_likelihoods_are_those_that_come_with_a_log_det() -> None:
    for name in ("triton", "torch"):
        flow, x = small(name)
        with torch.no_grad():
            maps, _ = flow.log_likelihood_maps(x)
            torch.testing.assert_close(flow.log_likelihoods(x), maps, **SAME_SUMS)


def test_likelihoods_without_latents_equal_those_of_the_latents() -> None:
    flow, x = small("triton")
    maps, log_det = flow.log_likelihood_maps(x)
    z, log_det_of_forward = flow(x)
    torch.testing.assert_close(maps, [-0.5 * level.square().mean(dim=1) for level in z], **OPERATION_CLOSE)
    # On a GPU the two forms of the kernel may add up in another order.
    torch.testing.assert_close(log_det, log_det_of_forward, **SAME_SUMS)


def test_models_are_served_as_they_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, device=DEVICE)
    assert not backend.uses_triton("torch", x)
    assert backend.uses_triton("triton", x)
    monkeypatch.setenv("FASTMSFLOW_BACKEND", "triton")
    assert backend.uses_triton("auto", x)
    with backend.use("torch"):
        assert not backend.uses_triton("triton", x)
    monkeypatch.setenv("FASTMSFLOW_BACKEND", "cuda")
    with pytest.raises(InputError, match="'cuda' is not known"):
        backend.uses_triton("auto", x)


def test_kernels_refuse_float64() -> None:
    flow, x = small("triton")
    with pytest.raises(InputError, match=r"not torch\.float64"):
        flow.double()([level.double() for level in x])
    assert not backend.uses_triton("auto", x[0].double())


def test_without_the_interpreter_a_cpu_tensor_is_refused(python: Path) -> None:
    program = (
        "import torch, fastmsflow\n"
        "flow = fastmsflow.MultiScaleFlow((8, 8), (4, 4), (1, 1), backend='triton')\n"
        "try: flow([torch.zeros(1, 8, 2, 2)] * 2)\n"
        "except fastmsflow.UnavailableError as error: print(error)\n"
        "flow.backend = 'auto'; flow([torch.zeros(1, 8, 2, 2)] * 2); print('auto serves')"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run([python, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "a cpu tensor was given" in run.stdout
    assert "TRITON_INTERPRET=1" in run.stdout
    assert "auto serves" in run.stdout


def test_without_triton_auto_serves_and_triton_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = backend.importlib.util.find_spec
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    monkeypatch.setattr(backend, "_faults", {})
    x = torch.zeros(1, device=DEVICE)
    with pytest.raises(UnavailableError, match="pip install triton"):
        backend.uses_triton("triton", x)
    assert not backend.uses_triton("auto", x)
