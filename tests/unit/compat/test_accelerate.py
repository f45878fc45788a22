"""Fast flows around live FrEIA modules: the same parameters, every FrEIA that there is, nothing but MSFlow's."""

import pytest
import torch
from torch import nn

from benchmarks.peers.freia import FreiaFusion
from fastmsflow import InputError
from fastmsflow.compat import accelerate
from tests.helpers.live_freia import (
    CHANNELS,
    as_between,
    as_master,
    conditions,
    features,
    live_flows,
    loss_of,
    parameters,
    run,
)
from tests.helpers.parity import relative_error
from tests.helpers.tolerances import AUTOCAST, FREIA_FLOAT32


def test_accelerated_modules_share_their_parameters_and_their_optimizer() -> None:
    parallel, fusion = live_flows()
    optimizer = torch.optim.Adam(parameters(parallel, fusion), lr=1e-3)
    before = loss_of(parallel, fusion, features()).item()
    fast = accelerate(parallel, fusion)
    assert {id(p) for p in parameters(*fast)} == {id(p) for p in parameters(parallel, fusion)}
    assert loss_of(*fast, features()).item() == pytest.approx(before, rel=1e-5)
    loss_of(*fast, features()).backward()
    optimizer.step()
    after = loss_of(parallel, fusion, features()).item()
    assert after != pytest.approx(before, rel=1e-5)
    assert loss_of(*fast, features()).item() == pytest.approx(after, rel=1e-5)
    for ours, theirs in zip((*fast[0], fast[1]), (*parallel, fusion), strict=True):
        assert {k: v.shape for k, v in ours.state_dict().items()} == {
            k: v.shape for k, v in theirs.state_dict().items()
        }


def test_eval_follows_a_fused_optimizer_that_trained_the_live_modules() -> None:
    parallel, fusion = live_flows()
    fast = accelerate(parallel, fusion)
    optimizer = torch.optim.Adam(parameters(parallel, fusion), lr=1e-2, fused=True)
    with torch.no_grad():
        run(*fast, features())
    loss_of(parallel, fusion, features()).backward()
    optimizer.step()
    with torch.no_grad():
        expected = run(parallel, fusion, features())[1]
        assert relative_error(run([f.eval() for f in fast[0]], fast[1].eval(), features())[1], expected) < FREIA_FLOAT32


def test_accelerating_twice_changes_nothing() -> None:
    fast = accelerate(*live_flows())
    again = accelerate(*fast)
    assert again[1] is fast[1]
    assert all(a is b for a, b in zip(again[0], fast[0], strict=True))


def test_modes_and_frozen_parameters_are_taken_over() -> None:
    parallel, fusion = live_flows()
    parallel[0].requires_grad_(False)
    parallel[0].eval()
    fast, fast_fusion = accelerate(parallel, fusion)
    assert [flow.training for flow in (*fast, fast_fusion)] == [False, True, True, True]
    loss_of(fast, fast_fusion, features()).backward()
    assert [any(p.grad is not None for p in flow.parameters()) for flow in fast] == [False, True, True]


def test_weights_loaded_into_the_live_modules_afterwards_are_followed() -> None:
    parallel, fusion = live_flows()
    fast = accelerate(parallel, fusion)
    others, _ = live_flows(seed=9)
    run(*fast, features())
    for flow, other in zip(parallel, others, strict=True):
        flow.load_state_dict(other.state_dict())
    with torch.no_grad():
        theirs = [f(x, [c])[0] for f, x, c in zip(others, features(), conditions(3), strict=True)]
        ours = [f(x, [c])[0] for f, x, c in zip(fast[0], features(), conditions(3), strict=True)]
    assert max(relative_error(a, b) for a, b in zip(ours, theirs, strict=True)) < FREIA_FLOAT32


@pytest.mark.parametrize("as_variant", [as_master, as_between], ids=["today's", "of summer 2023"])
def test_freias_git_master_is_recognised_by_what_it_computes(as_variant) -> None:
    parallel, fusion = live_flows()
    parallel = as_variant(parallel)
    fast = accelerate(parallel, fusion)
    with torch.no_grad():
        (ours, log_det), (theirs, expected) = run(*fast, features()), run(parallel, fusion, features())
        levels = list(zip(theirs, conditions(3), strict=True))
        back = [f(x, [c], rev=True) for f, (x, c) in zip(fast[0], levels, strict=True)]
        live = [f(x, [c], rev=True) for f, (x, c) in zip(parallel, levels, strict=True)]
    assert max(relative_error(a, b) for a, b in zip(ours, theirs, strict=True)) < FREIA_FLOAT32
    assert relative_error(log_det, expected) < FREIA_FLOAT32
    for (x, x_log_det), (live_x, live_log_det) in zip(back, live, strict=True):
        assert relative_error(x, live_x) < FREIA_FLOAT32
        assert relative_error(x_log_det, live_log_det) < FREIA_FLOAT32


def test_masters_blocks_built_for_another_grid_are_replaced_too() -> None:
    """The original's builder knows no grids; master's blocks then refuse features, the fast ones do not."""
    parallel, fusion = live_flows()
    parallel = as_master(parallel)
    expected = run(parallel, fusion, features())[1]
    for block in (block for flow in parallel for block in flow.module_list):
        block.dims_in = [(block.in_channels, 1, 1)]
    with pytest.raises(RuntimeError):
        run(parallel, fusion, features())
    assert relative_error(run(*accelerate(parallel, fusion), features())[1], expected) < FREIA_FLOAT32
    assert parallel[0].module_list[0].dims_in == [(CHANNELS[0], 1, 1)]


@pytest.mark.parametrize("as_variant", [lambda flows: flows, as_master], ids=["0.2", "master"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_live_modules_in_any_dtype_are_recognised(as_variant, dtype: torch.dtype) -> None:
    parallel, fusion = live_flows()
    parallel = as_variant(parallel)
    for block in (block for flow in parallel for block in flow.module_list):
        nn.init.normal_(block.subnet.conv2.weight, std=1.0)
    with torch.no_grad():
        expected = run(parallel, fusion, features())[0]
    for flow in (*parallel, fusion):
        flow.to(dtype)
    fast = accelerate(parallel, fusion)
    assert {id(p) for p in parameters(*fast)} == {id(p) for p in parameters(parallel, fusion)}
    with torch.no_grad():
        z = run(*fast, features(dtype=dtype))[0]
    tolerance = AUTOCAST.get(str(dtype).removeprefix("torch."), FREIA_FLOAT32)
    assert max(relative_error(a.float(), b) for a, b in zip(z, expected, strict=True)) < tolerance


def test_the_benchmarks_fusion_is_taken_as_well() -> None:
    parallel, _ = live_flows()
    fusion = FreiaFusion(CHANNELS, 1.9)
    for i, c in enumerate(CHANNELS):
        state = {"perm": torch.randperm(c)}
        fusion.module_list[i].load_state_dict({**state, "perm_inv": torch.argsort(state["perm"])})
    z, log_det = run(*accelerate(parallel, fusion), features())
    expected, expected_log_det = run(parallel, fusion, features())
    assert max(relative_error(a, b) for a, b in zip(z, expected, strict=True)) < FREIA_FLOAT32
    assert relative_error(log_det, expected_log_det) < FREIA_FLOAT32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p, f: p[0].module_list.__setitem__(0, nn.Conv2d(1, 1, 1)),
            r"parallel_flows\[0\].module_list\[0\] is a",
        ),
        (lambda p, f: p.__setitem__(0, nn.Identity()), "without blocks"),
        (lambda p, f: p.clear(), "empty"),
        (lambda p, f: setattr(p[1].module_list[1], "GIN", True), r"parallel_flows\[1\].module_list\[1\] computes"),
        (lambda p, f: p[0].module_list[0].w_perm.data.zero_(), "not a hard permutation"),
        (lambda p, f: f.module_list.pop(3), "3 modules"),
        (lambda p, f: setattr(f.module_list[3], "subnet_2", nn.Identity()), "subnet_2 is a Identity"),
        (lambda p, f: setattr(f.module_list[3].inner[0], "clamp", 3.0), "fusion_flow computes"),
        (
            lambda p, f: p[1].module_list[0].subnet.conv1.register_forward_hook(lambda *_: None),
            r"parallel_flows\[1\]\.module_list\.0\.subnet\.conv1 has hooks",
        ),
    ],
    ids=["block", "no blocks", "no levels", "GIN", "soft", "no coupling", "other subnet", "fusion's clamp", "hooks"],
)
def test_another_architecture_is_refused(change, message: str) -> None:
    parallel, fusion = live_flows()
    for block in (b for flow in parallel for b in flow.module_list):
        nn.init.normal_(block.subnet.conv2.weight, std=1.0)
    change(parallel, fusion)
    with pytest.raises(InputError, match=message):
        accelerate(parallel, fusion)
