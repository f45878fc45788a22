"""The count of launches and bytes: its rules on known operators, and the model's work at a small size."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from benchmarks import count_work
from benchmarks.count_work import MODES, Counts, breakdown, count
from benchmarks.recorded_work import Work, WorkByName, on_a_gpu, recording
from benchmarks.suite_settings import SIZES
from fastmsflow.ops.likelihood import log_likelihood_maps

WORKS = ("flow_inference", "end_to_end_inference", "training_step")
BATCHES = (2, 3)
# The small flow has two in each level's block; in each fusion subnet two, and a head a level.
CONVOLUTIONS = 3 * 2 + 2 * (2 + 3)


@pytest.fixture(scope="module")
def counts() -> Counts:
    return count(SIZES["small"], BATCHES)


@pytest.fixture
def pretended() -> Iterator[None]:
    with on_a_gpu(FakeTensorMode()):
        yield


def half(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float16)


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def launches(recorded_work: WorkByName, part: str = "") -> int:
    """Counts the launches of operators with ``part`` in their names."""
    return sum(work.launches for name, work in recorded_work.items() if part in name)


@contextmanager
def recorded(**expected: tuple[int, int]) -> Iterator[None]:
    """The block comes to ``expected`` launches and bytes, by the operator's name in aten, and to nothing else."""
    with recording() as recorded_work:
        yield
    assert dict(recorded_work) == {f"aten::{name}": Work(*work) for name, work in expected.items()}


@pytest.mark.usefixtures("pretended")
def test_an_operator_moves_each_operand_once_and_twice_where_it_changes_it() -> None:
    x, y = half(2, 3, 4, 5), half(2, 3, 4, 5)
    with recorded(relu=(1, 2 * 240), relu_=(1, 2 * 240), add=(1, 3 * 240), mul=(1, 2 * 240), copy_=(1, 2 * 240)):
        x.relu()
        x.relu_()
        x + y
        x * x
        x.copy_(y)


@pytest.mark.usefixtures("pretended")
def test_views_and_new_memory_are_no_work_and_a_views_bytes_are_its_own() -> None:
    x = half(2, 6, 4, 5)
    with recorded(clone=(2, 4 * 240), neg=(1, 2 * 240), add=(1, 2 * 480 + 12)):
        part = x[:, :3]
        assert torch.empty_like(x).view(2, -1).shape == (2, 120)
        part.contiguous()
        last(part)
        part.neg()
        x + half(6)[:, None, None].expand(2, -1, 4, 5)


@pytest.mark.usefixtures("pretended")
def test_the_vendors_convolution_copies_slices_and_adds_the_bias_in_a_pass_of_its_own() -> None:
    x, weight, bias = last(half(2, 6, 4, 5))[:, :3], last(half(8, 6, 3, 3))[:, :3], half(8)
    taken, weights, out = (2 * n for n in (2 * 3 * 20, 8 * 3 * 9, 2 * 8 * 20))
    with recording() as recorded_work:
        y = torch.nn.functional.conv2d(x, weight, bias, padding=1)
    assert dict(recorded_work) == {
        "copy of a convolution's input": Work(1, 2 * taken),
        "copy of a weight": Work(1, 2 * weights),
        "vendor's convolution": Work(1, taken + weights + out),
        "bias of a convolution": Work(1, 2 * out + 16),
    }
    assert y.is_contiguous(memory_format=torch.channels_last)
    with recording() as recorded_work:
        torch.nn.functional.conv2d(last(x), last(weight))
    assert launches(recorded_work, "copy of") == 0 and launches(recorded_work, "bias") == 0


@pytest.mark.usefixtures("pretended")
def test_a_convolutions_backward_pass_is_a_launch_a_gradient_and_the_bias_a_sum() -> None:
    x, weight, bias = last(half(2, 3, 4, 5)), last(half(8, 3, 3, 3)), half(8)
    y = torch.nn.functional.conv2d(x, weight.requires_grad_(), bias.requires_grad_(), padding=1)
    with recording() as recorded_work:
        torch.autograd.grad(y, (weight, bias), half(2, 8, 4, 5))
    grad = 2 * y.numel()
    assert dict(recorded_work) == {
        "copy of a gradient": Work(1, 2 * grad),
        "vendor's convolution: weight's gradient": Work(1, grad + 2 * (x.numel() + weight.numel())),
        "aten::sum": Work(1, grad + 16),
    }


@pytest.mark.usefixtures("pretended")
def test_padding_by_reflection_copies_channels_last_memory_there_and_back() -> None:
    x, weight = last(half(2, 3, 4, 5)), last(half(8, 3, 3, 3))
    with recording() as recorded_work:
        torch.nn.functional.conv2d(torch.nn.functional.pad(x, (1, 1, 1, 1), mode="reflect"), weight)
    small, large = 2 * x.numel(), 2 * 2 * 3 * 6 * 7
    assert recorded_work["copy of what is padded"] == Work(1, 2 * small)
    assert recorded_work["aten::reflection_pad2d"] == Work(1, small + large)
    assert recorded_work["copy of a convolution's input"] == Work(1, 2 * large)
    assert launches(recorded_work) == 4


@pytest.mark.usefixtures("pretended")
def test_cudnns_fused_convolutions_are_one_launch() -> None:
    x, weight, bias, z = last(half(2, 3, 4, 5)), last(half(8, 3, 3, 3)), half(8), last(half(2, 8, 2, 3))
    steps = ((2, 2), (1, 1), (1, 1), 1)
    with recording() as recorded_work:
        y = torch.ops.aten.cudnn_convolution_relu(x, weight, bias, *steps)
    own = 2 * (x.numel() + weight.numel() + z.numel()) + 16
    assert y.shape == z.shape and y.is_contiguous(memory_format=torch.channels_last)
    assert dict(recorded_work) == {"vendor's convolution with ReLU": Work(1, own)}
    with recording() as recorded_work:
        torch.ops.aten.cudnn_convolution_add_relu(x, weight, z, 1.0, bias, *steps)
    assert dict(recorded_work) == {"vendor's convolution with ReLU": Work(1, own + 2 * z.numel())}


@pytest.mark.usefixtures("pretended")
def test_a_slices_gradient_is_zeros_and_a_copy() -> None:
    x = half(2, 6).requires_grad_()
    y = x[:, :2]
    with recorded(zeros=(1, 2 * 12), copy_=(1, 2 * 2 * 4)):
        torch.autograd.grad(y, x, half(2, 2))


@pytest.mark.usefixtures("pretended")
def test_kernels_are_counted_inside_our_operators() -> None:
    z = [last(half(2, 8, 4, 5)), last(half(2, 16, 2, 3))]
    with recording() as recorded_work:
        maps = log_likelihood_maps(z, "triton")
    assert [level.shape for level in maps] == [(2, 4, 5), (2, 2, 3)]
    # Both levels in one launch, half precision in and float32 out.
    assert dict(recorded_work) == {"log_likelihood_kernel": Work(1, 2 * (320 + 192) + 4 * (40 + 12))}


@pytest.mark.slow
def test_the_librarys_own_convolutions_leave_none_to_the_vendor(counts: Counts) -> None:
    flows = counts["flow_inference"]
    assert launches(flows["fused"][2], "vendor") == launches(flows["fused"][2], "bias of") == 0
    assert launches(flows["fused"][2], "conv3x3") == CONVOLUTIONS
    assert launches(counts["training_step"]["fused"][2], "vendor") == 0
    assert launches(counts["end_to_end_inference"]["fused"][2], "vendor") > 0


@pytest.mark.parametrize("mode", ["auto", "torch"])
def test_a_flow_needs_each_of_its_convolutions_once_and_none_for_what_is_kept(counts: Counts, mode: str) -> None:
    assert launches(counts["flow_inference"][mode][2], "vendor's convolution") == CONVOLUTIONS
    assert launches(counts["flow_inference"][mode][2], "conv3x3") == 0


def test_plain_pytorch_launches_no_kernel_of_ours(counts: Counts) -> None:
    named = {name for work in WORKS for name in counts[work]["torch"][2]}
    assert {name for name in named if name.endswith("kernel") or name.startswith("fastmsflow")} == set()
    for work in WORKS:
        assert launches(counts[work]["auto"][2], "kernel") > 0
        assert launches(counts[work]["auto"][2]) < launches(counts[work]["torch"][2])


@pytest.mark.parametrize(("work", "mode"), list(product(WORKS, MODES)))
def test_launches_do_not_depend_on_the_batch_and_bytes_do(counts: Counts, work: str, mode: str) -> None:
    two, three = (counts[work][mode][batch] for batch in BATCHES)
    assert {name: each.launches for name, each in two.items()} == {name: each.launches for name, each in three.items()}
    moved = [sum(each.bytes for each in recorded_work.values()) for recorded_work in (two, three)]
    assert moved[0] < moved[1] < 1.5 * moved[0]


def test_a_step_updates_all_weights_in_one_launch_and_differentiates_each_convolution(counts: Counts) -> None:
    for mode in MODES:
        step = counts["training_step"][mode][2]
        assert step["aten::_fused_adam_"].launches == step["aten::_foreach_norm"].launches == 1
    step = counts["training_step"]["auto"][2]
    assert step["vendor's convolution: weight's gradient"].launches == step["vendor's convolution"].launches


@pytest.fixture
def printed(counts: Counts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Returns what the script prints, given the options."""

    def run(*options: str) -> str:
        monkeypatch.setattr(count_work, "count", lambda size: counts)
        monkeypatch.setattr(sys, "argv", ["count_work.py", "--size", "small", *options])
        count_work.main()
        return capsys.readouterr().out

    return run


def test_the_json_has_launches_and_megabytes_by_work_mode_and_batch(counts: Counts, printed) -> None:
    found = json.loads(printed("--json"))
    assert set(found) == set(WORKS) and {tuple(by_mode) for by_mode in found.values()} == {MODES}
    recorded_work = counts["flow_inference"]["auto"][3]
    megabytes = sum(each.bytes for each in recorded_work.values()) / 1e6
    assert found["flow_inference"]["auto"]["3"] == {
        "launches": launches(recorded_work),
        "megabytes": pytest.approx(megabytes, abs=0.06),
    }


def test_the_breakdowns_rows_add_up_to_the_table(counts: Counts, printed) -> None:
    legend, table, parts = printed("--breakdown").split("\n\n", 2)
    assert legend == count_work.LEGEND
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    assert len(rows) == len(WORKS) * len(MODES)
    assert parts.rstrip("\n") == "\n".join(breakdown(counts)).lstrip("\n")
    first = parts.split("\n\n")[1].splitlines()[2:]
    assert sum(int(line.split(" | ")[1]) for line in first) == int(rows[0][2])
