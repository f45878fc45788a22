"""Official checkpoints: what is read, what is written, and what is refused."""

import copy
import itertools
import os
import pickle
import warnings
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from torch import Tensor

from fastmsflow import InputError, MultiScaleFlow
from fastmsflow.compat import load_official, save_official
from tests.helpers.official_files import as_bytes
from tests.helpers.parity import NAMES, golden_inputs
from tests.helpers.paths import GOLDEN


def checkpoint(name: str = "tiny") -> dict:
    return torch.load(GOLDEN / f"{name}.pt", weights_only=True)


def written(content: object, folder: Path) -> Path:
    path = folder / "checkpoint.pt"
    torch.save(content, path)
    return path


def with_index_permutations(content: dict) -> dict:
    """The layout of FrEIA's git master."""
    for state in content["parallel_flows"]:
        for key in [k for k in state if k.endswith(".w_perm")]:
            perm = state[key][:, :, 0, 0].argmax(dim=1)
            state[key], state[f"{key}_inv"] = perm, perm.argsort()
    return content


@pytest.mark.parametrize(
    ("source", "target", "ending"),
    [
        ("a.pt", "b.pt", ".safetensors"),
        ("a.safetensors", "b.safetensors", ".pt"),
        ("a.ckpt", "b.safetensors", ".pt"),
        ("a.pt", "b", ".safetensors"),
    ],
)
def test_convert_refuses_a_target_of_the_wrong_ending(source: str, target: str, ending: str, command, tmp_path) -> None:
    (tmp_path / source).write_text("not looked at")
    code, text = command("convert", tmp_path / source, tmp_path / target)
    assert code == 1 and f"what {source} is converted to ends in {ending}" in text
    assert [path.name for path in tmp_path.iterdir()] == [source]


def test_fusion_first_without_an_optimizer_is_refused(command, tmp_path: Path) -> None:
    code, text = command("convert", GOLDEN / "tiny.pt", tmp_path / "own.safetensors", "--fusion-first")
    assert code == 1 and "--fusion-first is of a run's state.ckpt" in text


def same_state(a: MultiScaleFlow, b: MultiScaleFlow) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def coupling_by_hand(flow: MultiScaleFlow, x: Tensor, ratio: float) -> Tensor:
    """The first block of level 0, written out: s = alpha tanh(r / ratio)."""
    block, condition = flow.parallel_flows[0].blocks[0], flow.position_codes[0](x)
    net = block.subnet
    hidden = net.conv1(torch.cat([x[:, : block.half_channels], condition.expand(len(x), -1, -1, -1)], dim=1))
    r = 0.1 * net.conv2(net.norm(hidden.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).relu())
    s, t = flow.clamp * torch.tanh(r[:, : block.half_channels] / ratio), r[:, block.half_channels :]
    u = torch.cat([x[:, : block.half_channels], x[:, block.half_channels :] * s.exp() + t], dim=1)
    gain = 0.1 * torch.nn.functional.softplus(block.global_scale, beta=0.5)
    return (u * gain[:, None, None] + block.global_offset[:, None, None])[:, block.perm]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read_back_to_the_bit(name: str, tmp_path: Path) -> None:
    flow = load_official(GOLDEN / f"{name}.pt")
    save_official(flow.to(memory_format=torch.channels_last), tmp_path / "again.pt", epoch=3)
    again, original = torch.load(tmp_path / "again.pt", weights_only=True), checkpoint(name)
    assert same_state(flow, load_official(tmp_path / "again.pt"))
    assert as_bytes(again) == as_bytes(original)


ORDERS = list(itertools.permutations(range(3)))


def in_order(content: dict, order: tuple[int, ...]) -> dict:
    """The content with its fusion flow's permutations in another order."""
    fusion = content["fusion_flow"]
    pairs = [(fusion[f"module_list.{i}.perm"], fusion[f"module_list.{i}.perm_inv"]) for i in range(3)]
    for i, source in enumerate(order):
        fusion[f"module_list.{i}.perm"], fusion[f"module_list.{i}.perm_inv"] = pairs[source]
    return content


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "indices"])
@pytest.mark.parametrize("order", ORDERS)
def test_a_file_keeps_its_order_and_layout_there_and_back(order: tuple[int, ...], dense: bool, tmp_path: Path) -> None:
    content = in_order(checkpoint(), order)
    path = written(content if dense else with_index_permutations(content), tmp_path)
    flow = copy.deepcopy(load_official(path, variant="0.2"))
    assert flow.official_layout is not None and flow.official_layout.dense == dense
    save_official(flow, tmp_path / "again.pt", epoch=content["epoch"])
    assert as_bytes(torch.load(tmp_path / "again.pt", weights_only=True)) == as_bytes(content)


def test_levels_of_the_same_length_keep_the_files_order(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_official(MultiScaleFlow((16, 24, 16), (8, 8, 8), (1, 1, 1)), tmp_path / "first.pt")
    content = in_order(torch.load(tmp_path / "first.pt", weights_only=True), (1, 2, 0))
    flow = load_official(written(content, tmp_path))
    assert flow.official_layout is not None and flow.official_layout.order == (1, 0, 2)
    assert torch.equal(flow.fusion_flow.perm0, content["fusion_flow"]["module_list.1.perm"])
    save_official(flow, tmp_path / "again.pt")
    assert as_bytes(torch.load(tmp_path / "again.pt", weights_only=True)) == as_bytes(content)


def test_a_flow_that_was_never_official_is_written_in_the_order_of_its_levels(tmp_path: Path) -> None:
    for form, dimensions in (("tanh", 4), ("scaled_tanh", 1)):
        save_official(MultiScaleFlow((16, 24, 40), (8, 8, 8), (1, 1, 1), clamp_form=form), tmp_path / "new.pt")
        content = torch.load(tmp_path / "new.pt", weights_only=True)
        assert [len(content["fusion_flow"][f"module_list.{i}.perm"]) for i in range(3)] == [16, 24, 40]
        assert content["parallel_flows"][0]["module_list.0.w_perm"].ndim == dimensions


@pytest.mark.parametrize("order", ORDERS)
def test_fusion_permutations_are_matched_by_length_in_any_order(order: tuple[int, ...], tmp_path: Path) -> None:
    content = in_order(checkpoint(), order)
    assert same_state(load_official(written(content, tmp_path)), load_official(GOLDEN / "tiny.pt"))


@pytest.mark.filterwarnings("ignore::fastmsflow.errors.InputWarning")
def test_index_permutations_have_the_formula_that_the_variant_names_and_freia_0_2s_else(tmp_path: Path) -> None:
    path = written(with_index_permutations(checkpoint()), tmp_path)
    x = golden_inputs("tiny", torch.float64)
    for variant, ratio in (("auto", 1.0), ("master", 1.9), ("0.2", 1.0)):
        flow = load_official(path, variant=variant).double()
        z = flow.parallel_flows[0].blocks[0](x[0], flow.position_codes[0](x[0]))[0]
        torch.testing.assert_close(z, coupling_by_hand(flow, x[0], ratio))


def test_dense_permutations_mean_the_formula_of_freia_0_2() -> None:
    x = golden_inputs("tiny", torch.float64)
    for variant, ratio in (("auto", 1.0), ("0.2", 1.0)):
        flow = load_official(GOLDEN / "tiny.pt", variant=variant).double()
        z = flow.parallel_flows[0].blocks[0](x[0], flow.position_codes[0](x[0]))[0]
        torch.testing.assert_close(z, coupling_by_hand(flow, x[0], ratio))


def test_dense_permutations_forced_to_masters_formula_are_refused() -> None:
    with pytest.raises(InputError, match=r"tiny\.pt: dense permutations are FrEIA 0\.2's, .*: use 'auto'"):
        load_official(GOLDEN / "tiny.pt", variant="master")


def test_index_layout_is_read_back_to_the_bit(tmp_path: Path) -> None:
    flow = load_official(written(with_index_permutations(checkpoint()), tmp_path), variant="master")
    save_official(flow, tmp_path / "again.pt")
    again = load_official(tmp_path / "again.pt", variant="master")
    assert again.clamp_form == flow.clamp_form == "scaled_tanh"
    assert same_state(flow, again)
    assert torch.load(tmp_path / "again.pt", weights_only=True)["parallel_flows"][0]["module_list.0.w_perm"].ndim == 1


def test_clamp_and_device_are_honoured() -> None:
    flow = load_official(GOLDEN / "tiny.pt", clamp=1.2, device="cpu", backend="torch")
    assert (flow.clamp, flow.backend, flow.training) == (1.2, "torch", False)


def drop(part: int | str, key: str):
    def change(content: dict) -> dict:
        del (content["fusion_flow"] if part == "fusion" else content["parallel_flows"][part])[key]
        return content

    return change


def put(part: int | str, key: str, value: Tensor):
    def change(content: dict) -> dict:
        (content["fusion_flow"] if part == "fusion" else content["parallel_flows"][part])[key] = value
        return content

    return change


FAULTS = {
    "missing weight": (drop(1, "module_list.0.subnet.conv2.bias"), "module_list.0.subnet.conv2.bias"),
    "missing permutation": (drop(0, "module_list.1.w_perm"), "module_list.1.w_perm"),
    "missing inverse": (drop(2, "module_list.1.w_perm_inv"), "module_list.1.w_perm_inv"),
    "missing block": (drop(2, "module_list.1.global_scale"), "module_list.1.global_scale"),
    "missing first scale": (drop(2, "module_list.0.global_scale"), "module_list.0.global_scale"),
    "extra weight": (put(0, "module_list.0.subnet.conv3.weight", torch.zeros(1)), "subnet.conv3.weight"),
    "extra block": (put(0, "module_list.2.global_scale", torch.zeros(1, 16, 1, 1)), "module_list.2.global_offset"),
    "misshapen weight": (put(1, "module_list.0.subnet.ln.weight", torch.zeros(3)), "subnet.ln.weight is"),
    "misshapen first convolution": (put(1, "module_list.0.subnet.conv1.weight", torch.zeros(9)), "conv1.weight"),
    "soft permutation": (put(0, "module_list.0.w_perm", torch.rand(16, 16, 1, 1)), "not a hard permutation"),
    "wrong inverse": (put(0, "module_list.0.w_perm_inv", torch.eye(16)[:, :, None, None]), "not a hard permutation"),
    "fusion: missing weight": (drop("fusion", "module_list.3.subnet_1.conv_s.0.bias"), "subnet_1.conv_s.0.bias"),
    "fusion: missing permutation": (drop("fusion", "module_list.1.perm"), "a permutation of 64 channels"),
    "fusion: missing inverse": (drop("fusion", "module_list.1.perm_inv"), "module_list.1.perm_inv"),
    "fusion: extra weight": (put("fusion", "module_list.4.perm", torch.arange(4)), "module_list.4.perm"),
    "fusion: misshapen": (
        put("fusion", "module_list.3.subnet_2.conv_t.1.weight", torch.zeros(2)),
        "conv_t.1.weight is",
    ),
    "fusion: not a permutation": (
        put("fusion", "module_list.0.perm", torch.zeros(32).long()),
        "not a hard permutation",
    ),
    "fusion: of other channels": (
        put("fusion", "module_list.0.perm", torch.arange(48)),
        "a permutation of 32 channels",
    ),
    "no fusion flow": (lambda c: {k: v for k, v in c.items() if k != "fusion_flow"}, "fusion_flow"),
    "no parallel flows": (lambda c: {**c, "parallel_flows": []}, "parallel_flows"),
    "empty level": (lambda c: {**c, "parallel_flows": [*c["parallel_flows"][:2], {}]}, r"parallel_flows\[2\]"),
    "one level less": (lambda c: {**c, "parallel_flows": c["parallel_flows"][:2]}, "fusion_flow"),
    "not a dict": (lambda c: list(c), "holds a list"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_that_does_not_fit_is_refused_naming_the_key(fault: str, tmp_path: Path) -> None:
    change, named = FAULTS[fault]
    path = written(change(checkpoint()), tmp_path)
    with pytest.raises(InputError, match=named) as caught:
        load_official(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False], ids=["torch.save", "plain pickle"])
def test_a_malicious_pickle_is_refused_and_never_run(zipped: bool, tmp_path: Path) -> None:
    content = {**checkpoint(), "epoch": Malicious(tmp_path / "owned")}
    path = written(content, tmp_path)
    if not zipped:
        path.write_bytes(pickle.dumps(content))
    with warnings.catch_warnings(), pytest.raises(InputError, match="refused"):
        warnings.simplefilter("error")
        load_official(path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("length", [0, 10, 1000, 500_000])
def test_a_truncated_file_is_one_clear_line(length: int, tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    path.write_bytes((GOLDEN / "tiny.pt").read_bytes()[:length])
    with pytest.raises(InputError, match=r"cut\.pt") as caught:
        load_official(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_official(tmp_path / "none.pt")


def test_a_failed_write_leaves_the_earlier_file(tmp_path: Path, monkeypatch) -> None:
    flow, path = load_official(GOLDEN / "tiny.pt"), tmp_path / "model.pt"
    save_official(flow, path)
    before = path.read_bytes()

    def fail(content: object, file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_official(flow, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]
