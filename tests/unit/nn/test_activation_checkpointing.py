"""Training in less memory: the same gradients, fewer activations, and an error where an inverse is too far off."""

from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.low_memory import measured
from fastmsflow import InputError, MultiScaleFlow, backend
from fastmsflow.kernels import configs
from fastmsflow.nn.activation_checkpointing import ACTIVATION_CHECKPOINTING
from fastmsflow.nn.invertible import LIMIT, SEGMENT, invertible
from fastmsflow.nn.parallel_flow import ParallelFlow
from tests.helpers.ops_parity import DEVICE
from tests.helpers.processes import run_processes
from tests.helpers.tolerances import FLOW_CLOSE, INVERTED

CHANNELS, GRIDS = (8, 12, 6), ((6, 10), (3, 5), (2, 3))
WORLD = 2


def flow_and_batch(
    memory: str | None, dtype: torch.dtype, batch: int = 2, blocks: tuple[int, ...] = (1, SEGMENT, SEGMENT + 1)
) -> tuple[MultiScaleFlow, list[Tensor]]:
    """A flow whose every parameter matters."""
    torch.manual_seed(1)
    flow = MultiScaleFlow(CHANNELS, (8, 4, 8), blocks).to(dtype)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    flow.activation_checkpointing = memory
    return flow, [torch.randn(batch, c, *grid, dtype=dtype) for c, grid in zip(CHANNELS, GRIDS, strict=True)]


def gradients(
    memory: str | None, dtype: torch.dtype = torch.float64, autocast: bool = False, scale: float = 1.0
) -> list[Tensor]:
    """Returns gradients of the features, then of the parameters. ``scale`` multiplies the log-scales."""
    flow, x = flow_and_batch(memory, dtype)
    with torch.no_grad():
        for block in (block for level in flow.parallel_flows for block in level.blocks):
            block.subnet.conv2.weight[: block.half_channels] *= scale
    leaves = [level.requires_grad_() for level in x]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = flow.nll(leaves).mean()
    loss.backward()
    return [tensor.grad for tensor in (*leaves, *flow.parameters())]


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    flat, other = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (found, expected))
    return ((flat - other).norm() / other.norm()).item()


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16 autocast"])
def test_recomputed_gradients_are_the_same_to_the_bit(autocast: bool) -> None:
    expected, found = (gradients(memory, torch.float32, autocast) for memory in (None, "recompute"))
    assert all(map(torch.equal, found, expected))


def test_inverted_gradients_are_the_same_but_for_rounding() -> None:
    assert error(gradients("invertible"), gradients(None)) < INVERTED["float64"]


@pytest.mark.parametrize("scale", [1.0, 15.0])
@pytest.mark.parametrize(("autocast", "limit"), [(False, "float32"), (True, "bfloat16")])
def test_inverted_gradients_of_small_and_large_log_scales(scale: float, autocast: bool, limit: str) -> None:
    of = [gradients(memory, torch.float32, autocast, scale) for memory in ("invertible", None)]
    assert error(*of) < INVERTED[limit]


@pytest.mark.slow
def test_the_kernels_gradients_are_the_same_too(monkeypatch: pytest.MonkeyPatch) -> None:
    # A vendor's gradients may be summed in any order.
    monkeypatch.setattr(configs, "own_convolution_is_faster", lambda *_: True)
    torch.manual_seed(1)
    flow = ParallelFlow(4, 4, 2, clamp=1.9, clamp_form="tanh").to(DEVICE)
    x, condition = (torch.randn(1, 4, 2, 2).to(DEVICE) for _ in range(2))
    found = {}
    for memory in (None, *ACTIVATION_CHECKPOINTING):
        flow.zero_grad()
        with backend.use("triton"):
            z, log_det = flow(x, condition, activation_checkpointing=memory)
        # Outside of the block, as a GPU's thread is, which runs backward passes.
        (z.square().sum() - log_det.sum()).backward()
        found[memory] = [parameter.grad for parameter in flow.parameters()]
    assert all(map(torch.equal, found["recompute"], found[None]))
    assert error(found["invertible"], found[None]) < INVERTED["float32"]


def test_each_mode_keeps_less_for_the_backward_pass() -> None:
    stored = {}
    for memory in (None, *ACTIVATION_CHECKPOINTING):
        flow, x = flow_and_batch(memory, torch.float32, batch=64)
        stored[memory], _ = measured(flow, x, bf16=False)
    # Of ten blocks' activations their ten inputs are left, then four segments' outputs.
    assert stored["recompute"] < stored[None] / 4
    assert stored["invertible"] < stored["recompute"] / 1.5


def test_where_no_gradient_is_taken_nothing_changes() -> None:
    expected, x = flow_and_batch(None, torch.float32)
    with torch.no_grad():
        z, log_det = expected(x)
        for memory in ACTIVATION_CHECKPOINTING:
            flow, _ = flow_and_batch(memory, torch.float32)
            again, log_det_again = flow(x)
            assert all(map(torch.equal, again, z))
            assert torch.equal(log_det, log_det_again)


def test_a_reconstruction_that_is_off_stops_the_training_with_the_remedy() -> None:
    flow, x = flow_and_batch("invertible", torch.float32)
    with torch.no_grad():
        # x 1e-13 + 1: float32 keeps nothing of x.
        flow.parallel_flows[1].blocks[1].global_scale.fill_(-60.0)
        flow.parallel_flows[1].blocks[1].global_offset.fill_(1.0)
    with pytest.raises(InputError, match=rf"is off by .* %, more than {100 * LIMIT:g} %; .* 'recompute'") as caught:
        flow.nll(x).mean().backward()
    assert "\n" not in str(caught.value)


def test_a_loss_that_is_not_finite_is_left_to_its_own_error() -> None:
    flow, x = flow_and_batch("invertible", torch.float32)
    with torch.no_grad():
        flow.parallel_flows[1].blocks[1].global_offset.fill_(float("nan"))
    loss = flow.nll(x).mean()
    loss.backward()
    assert loss.isnan()


def test_features_in_half_precision_are_refused() -> None:
    flow, x = flow_and_batch("invertible", torch.bfloat16)
    with pytest.raises(InputError, match=r"float32, not torch\.bfloat16; use activation checkpointing 'recompute'"):
        flow.nll(x)


def test_the_order_of_the_next_flow_is_in_the_last_store() -> None:
    flow, x = flow_and_batch(None, torch.float64)
    level, code, order = flow.parallel_flows[1], flow.position_codes[1], flow.fusion_flow.input_perms[1]
    plain = level(x[1], code(x[1]), "torch", order)
    torch.testing.assert_close(
        invertible(level.blocks, x[1], code(x[1]), backend="torch", output_perm=order), plain, rtol=1e-12, atol=0
    )


def one_process(rank: int, rendezvous: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=WORLD)
    for memory in ACTIVATION_CHECKPOINTING:
        flow, batch = flow_and_batch(memory, torch.float32, 2 * WORLD)
        # Frozen parts as well: every other parameter must get its gradient.
        flow.parallel_flows[1].requires_grad_(False)
        shared = DistributedDataParallel(Loss(flow), find_unused_parameters=False)
        for _ in range(2):  # the second pass fails where the first left a parameter out
            shared.zero_grad()
            shared([level[rank::WORLD] for level in batch]).backward()
        if rank == 0:
            torch.save([p.grad for p in flow.parameters()], f"{out}/{memory}.pt")
    torch.distributed.destroy_process_group()


class Loss(torch.nn.Module):
    def __init__(self, flow: MultiScaleFlow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, batch: list[Tensor]) -> Tensor:
        return self.flow.nll(batch).mean()


@pytest.mark.slow
def test_two_processes_compute_the_gradients_of_one_and_of_parts_that_are_not_frozen(tmp_path: Path) -> None:
    run_processes(one_process, (str(tmp_path / "rendezvous"), str(tmp_path)), WORLD)
    flow, batch = flow_and_batch(None, torch.float32, 2 * WORLD)
    flow.parallel_flows[1].requires_grad_(False)
    flow.nll(batch).mean().backward()
    expected = [p.grad for p in flow.parameters()]
    for memory in ACTIVATION_CHECKPOINTING:
        found = torch.load(tmp_path / f"{memory}.pt")
        assert [grad is None for grad in found] == [grad is None for grad in expected]
        pairs = [(a, b) for a, b in zip(found, expected, strict=True) if b is not None]
        torch.testing.assert_close(*map(list, zip(*pairs, strict=True)), **FLOW_CLOSE)
