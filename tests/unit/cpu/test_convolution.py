"""How a CPU convolves in inference: the choice, its numbers, and the cache of prepared weights."""

import copy
import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functionalize, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from fastmsflow import InputError, MultiScaleFlow, backend
from fastmsflow.cpu import convolution, onednn
from fastmsflow.cpu.convolution import SAME
from fastmsflow.cpu.winograd import F2, F4, Tile
from fastmsflow.ops.conv3x3 import conv3x3
from fastmsflow.reference.convolution_relu import Geometry
from tests.helpers.ops_parity import error_in_the_norm
from tests.helpers.tolerances import GOLDEN_LOG_DET_PER_ELEMENT, OPERATION, THREADS, WINOGRAD

pytestmark = pytest.mark.skipif(not onednn.is_available(), reason="PyTorch has no oneDNN for this CPU")


@pytest.fixture(autouse=True)
def empty_cache() -> Iterator[None]:
    convolution.set_winograd_memory(1024)
    yield
    convolution.set_winograd_memory(None)


def operands(
    inputs: int, outputs: int, grid: tuple[int, int] = (16, 16), batch: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    shapes = ((batch, inputs, *grid), (outputs, inputs, 3, 3), (outputs,))
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return x, weight, bias


def tiles_of(weight: Tensor) -> list[Tile | None]:
    """Returns how the cache convolves with a weight."""
    entry = convolution._entries.get(weight)
    return [] if entry is None else [plan.tile for plan in entry.plans.values()]


def largest_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@pytest.mark.parametrize("grid", [(3, 5), (7, 9), (16, 16), (33, 20)], ids=str)
@pytest.mark.parametrize(
    ("inputs", "outputs", "dtype"),
    [
        (24, 40, torch.float32),
        (112, 144, torch.float32),
        (320, 512, torch.float32),
        (40, 112, torch.bfloat16),
        (112, 144, torch.bfloat16),
    ],
)
@torch.no_grad()
def test_every_way_agrees_with_float64(
    inputs: int, outputs: int, dtype: torch.dtype, grid: tuple[int, int], batch: int
) -> None:
    x, weight, bias = operands(inputs, outputs, grid, batch, dtype)
    residual = torch.randn(batch, outputs, *grid, generator=torch.Generator().manual_seed(0)).to(dtype)
    bound = WINOGRAD if dtype == torch.float32 else OPERATION["bfloat16"]
    for reflects in (False, True):
        padded = F.pad(x.double(), (1, 1, 1, 1), mode="reflect" if reflects else "constant")
        plain = F.conv2d(padded, weight.double(), bias.double())
        geometry = Geometry() if reflects else SAME
        found = convolution.convolve(x, weight, bias, geometry, reflects=reflects)
        assert largest_error(found, plain) < bound
        added = convolution.convolve(x, weight, bias, geometry, reflects=reflects, residual=residual, relu=True)
        assert largest_error(added, (plain + residual.double()).relu()) < bound


@pytest.mark.parametrize(
    "geometry",
    [Geometry((2, 2), (1, 1)), Geometry(padding=(2, 2), dilation=(2, 2)), Geometry((1, 2), (0, 1)), Geometry()],
    ids=str,
)
@torch.no_grad()
def test_other_geometries_are_packed_only(geometry: Geometry) -> None:
    x, weight, bias = operands(128, 192, (14, 18), batch=2)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), *geometry)
    assert largest_error(convolution.convolve(x, weight, bias, geometry), expected) < WINOGRAD
    assert tiles_of(weight) == [None]


@torch.no_grad()
def test_groups_are_packed_only() -> None:
    x, _, bias = operands(256, 256)
    weight = torch.randn(256, 128, 3, 3)
    geometry = Geometry(padding=(1, 1), groups=2)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), *geometry)
    assert largest_error(convolution.convolve(x, weight, bias, geometry), expected) < WINOGRAD
    assert tiles_of(weight) == [None]


@pytest.mark.parametrize(
    ("inputs", "outputs", "grid", "tile"),
    [(192, 256, (32, 32), F4), (576, 1024, (16, 16), F4), (40, 56, (32, 32), None), (160, 224, (8, 8), None)],
)
@torch.no_grad()
def test_the_choice_follows_the_table(inputs: int, outputs: int, grid: tuple[int, int], tile: Tile | None) -> None:
    x, weight, bias = operands(inputs, outputs, grid)
    convolution.convolve(x, weight, bias)
    assert tiles_of(weight) == [tile]


@torch.no_grad()
def test_the_bound_of_memory_chooses_smaller_filters() -> None:
    bytes_of_f4 = 4 * F4.places * 512 * 576
    for mebibytes, tile in ((bytes_of_f4 >> 20, None), (1 + (bytes_of_f4 >> 20), F4), (20, F2), (0, None)):
        convolution.set_winograd_memory(mebibytes)
        x, weight, bias = operands(512, 576)
        convolution.convolve(x, weight, bias)
        expected = F2 if tile is None and mebibytes else tile
        assert tiles_of(weight) == [expected], mebibytes
        assert convolution._held_bytes() <= mebibytes << 20


@torch.no_grad()
def test_the_environment_bounds_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    convolution.set_winograd_memory(None)
    monkeypatch.setenv(convolution.MEMORY_VARIABLE, "0")
    x, weight, bias = operands(128, 192)
    convolution.convolve(x, weight, bias)
    assert tiles_of(weight) == [None]
    for wrong in ("-1", "1.5", "lots", "٣"):
        monkeypatch.setenv(convolution.MEMORY_VARIABLE, wrong)
        with pytest.raises(InputError, match="give a whole number of MiB"):
            convolution.convolve(x, operands(128, 192)[1], bias)
    with pytest.raises(InputError, match="give 0 or more"):
        convolution.set_winograd_memory(-1)


@torch.no_grad()
def test_filters_take_at_most_a_quarter_of_the_available_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    convolution.set_winograd_memory(None)
    needed = 4 * F4.places * 128 * 192
    for available, tile in ((4 * needed - 1, None), (4 * needed, F4)):
        monkeypatch.setattr(convolution, "available_memory", lambda available=available: available)
        x, weight, bias = operands(128, 192)
        convolution.convolve(x, weight, bias)
        assert tiles_of(weight) == [tile]


@torch.no_grad()
def test_changed_weights_and_biases_are_prepared_anew() -> None:
    x, weight, bias = operands(128, 160)
    changes = (
        lambda: weight.mul_(2),
        lambda: bias.add_(1),
        lambda: weight.copy_(torch.randn(160, 128, 3, 3)),
        lambda: weight.set_(torch.randn(160, 128, 3, 3)),
    )
    conv3x3(x, weight, bias)
    for change in changes:
        change()
        expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
        assert largest_error(conv3x3(x, weight, bias), expected) < WINOGRAD


@torch.no_grad()
def test_weights_and_biases_at_the_address_of_older_ones_are_prepared_anew() -> None:
    x, weight, bias = operands(128, 160)
    for operand in (weight, bias):
        memory = bytearray(4 * operand.numel())
        for _ in range(2):
            operand.data = torch.frombuffer(memory, dtype=torch.float32).view_as(operand).normal_()
            expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
            assert largest_error(conv3x3(x, weight, bias), expected) < WINOGRAD


@torch.no_grad()
def test_transforms_and_modes_of_torch_are_left_to_pytorch_and_leave_nothing_behind() -> None:
    x, weight, bias = operands(128, 160, batch=2)

    def convolved(x: Tensor) -> Tensor:
        return conv3x3(x, weight, bias)

    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    plain = functionalize(convolved)(x), vmap(lambda image: convolved(image[None])[0])(x), jvp(convolved, (x,), (x,))[0]
    with FlopCounterMode(display=False) as counter:
        counted = convolved(x)
    assert counter.get_total_flops() == 2 * 9 * 128 * 160 * 2 * 16 * 16
    with forward_ad.dual_level():
        pushed = forward_ad.unpack_dual(convolved(forward_ad.make_dual(x, x))).tangent
        assert pushed is not None and largest_error(pushed + bias[:, None, None], expected) < WINOGRAD
    assert not tiles_of(weight)
    for found in (*plain, counted, convolved(x)):
        assert largest_error(found, expected) < WINOGRAD


@torch.no_grad()
def test_the_default_device_is_not_that_of_a_bias() -> None:
    x, weight, bias = operands(128, 160)
    with torch.device("meta"):
        assert conv3x3(x, weight, bias).device.type == "cpu"


@torch.no_grad()
def test_a_bias_is_held_so_that_no_new_one_takes_its_place() -> None:
    x, weight, bias = operands(128, 160)
    conv3x3(x, weight, bias)
    held = weakref.ref(bias)
    del bias
    gc.collect()
    assert held() is not None
    conv3x3(x, weight)
    gc.collect()
    assert held() is None


@torch.no_grad()
def test_batches_of_all_sizes_share_filters_and_the_cache_stays_small() -> None:
    _, weight, bias = operands(128, 160)
    for batch in (8, 7, 6, 5, 4, 3):
        x = operands(128, 160, batch=batch)[0]
        expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
        assert largest_error(convolution.convolve(x, weight, bias), expected) < WINOGRAD
    assert convolution._held_bytes() == 4 * F4.places * 128 * 160
    assert len(tiles_of(weight)) == convolution.SHAPES_HELD


@torch.no_grad()
def test_prepared_weights_live_as_long_as_the_weight() -> None:
    x, weight, bias = operands(128, 160)
    convolution.convolve(x, weight, bias)
    assert convolution._held_bytes() > 0
    del weight
    gc.collect()
    assert convolution._held_bytes() == 0


def test_training_drops_prepared_weights() -> None:
    flow = MultiScaleFlow((256, 512, 1024), blocks=(1, 1, 1)).eval()
    features = [torch.randn(1, c, 16, 16) for c in flow.channels]
    with torch.no_grad():
        flow.nll(features)
    assert convolution._held_bytes() > 0
    copied = copy.deepcopy(flow)
    flow.train()
    assert convolution._held_bytes() == 0
    with torch.no_grad():
        copied.nll(features)
    # A fused optimizer changes weights without a word after a step like this one.
    copied.nll(features).sum().backward()
    assert convolution._held_bytes() == 0


def test_graphs_gradients_and_other_tensors_are_left_to_pytorch() -> None:
    x, weight, bias = operands(128, 160)
    assert not convolution.serves(x, weight, bias)
    with torch.no_grad():
        assert convolution.serves(x, weight, bias)
        with torch.autocast("cpu", torch.bfloat16):
            assert not convolution.serves(x, weight, bias)
        assert not convolution.serves(x.double(), weight.double(), bias)
        assert not convolution.serves(x.to("meta"), weight, bias)
        assert not convolution.serves(x[:0], weight, bias)
        with torch.backends.mkldnn.flags(enabled=False):
            assert not convolution.serves(x, weight, bias)
    with torch.inference_mode():
        assert not convolution.serves(x, torch.randn(160, 128, 3, 3), bias)
    program = torch.export.export(Convolution(weight), (x,))
    assert not [node for node in program.graph.nodes if "mkldnn" in str(node.target)]


class Convolution(nn.Module):
    """Convolves as the subnets do."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return conv3x3(x, self.weight)


@torch.no_grad()
def test_the_torch_backend_is_pytorch_to_the_bit() -> None:
    x, weight, bias = operands(128, 160)
    expected = F.conv2d(x, weight, bias, padding=1)
    assert torch.equal(conv3x3(x, weight, bias, "torch"), expected)
    with backend.use("torch"):
        assert torch.equal(conv3x3(x, weight, bias), expected)
    assert not torch.equal(conv3x3(x, weight, bias), expected)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def test_the_result_is_the_same_to_the_bit_and_nearly_so_with_more_threads(threads: None) -> None:
    flow = MultiScaleFlow((256, 320, 512), blocks=(1, 1, 1)).eval()
    features = [torch.randn(2, c, side, side) for c, side in zip(flow.channels, (33, 17, 9), strict=True)]
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(flow(features)[0])
        assert all(torch.equal(*pair) for pair in zip(flow(features)[0], found[-1], strict=True))
    assert max(error_in_the_norm(*pair) for pair in zip(*found, strict=True)) < THREADS


@torch.no_grad()
def test_a_whole_flow_agrees_with_float64() -> None:
    flow = MultiScaleFlow((256, 320, 512), blocks=(2, 1, 1)).eval()
    features = [torch.randn(2, c, side, side) for c, side in zip(flow.channels, (24, 17, 9), strict=True)]
    expected, log_det = copy.deepcopy(flow).double()([level.double() for level in features])
    found, found_log_det = flow(features)
    assert max(largest_error(*pair) for pair in zip(found, expected, strict=True)) < WINOGRAD
    elements = sum(level[0].numel() for level in features)
    assert (found_log_det - log_det).abs().max() < GOLDEN_LOG_DET_PER_ELEMENT * elements
    back, _ = flow.inverse(found)
    assert max(largest_error(ours, given.double()) for ours, given in zip(back, features, strict=True)) < WINOGRAD


@pytest.mark.parametrize(("inputs", "outputs"), [(24, 40), (128, 160)], ids=["packed", "Winograd"])
@torch.no_grad()
def test_inputs_of_every_layout_are_taken(inputs: int, outputs: int) -> None:
    _, weight, bias = operands(inputs, outputs)
    wide = torch.randn(2, 2 * inputs, 16, 16)
    channels_last = wide.contiguous(memory_format=torch.channels_last)
    layouts = {
        "a half": wide[:, inputs:],
        "a half in channels-last": channels_last[:, :inputs],
        "every second channel": channels_last[:, ::2],
        "one image for all": wide[:1, :inputs].expand(2, -1, -1, -1),
        "turned": wide[:, :inputs].transpose(2, 3),
        "one row": wide[:, :inputs, :1],
    }
    for name, x in layouts.items():
        for filters in (weight, weight.contiguous(memory_format=torch.channels_last)):
            residual = torch.randn(2, outputs, *x.shape[2:])
            expected = F.conv2d(x.double(), filters.double(), bias.double(), padding=1) + residual.double()
            found = convolution.convolve(x, filters, bias, residual=residual)
            assert largest_error(found, expected) < WINOGRAD, name
