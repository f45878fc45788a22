"""In place of the reference implementation: its call, its files, its training loop."""

import copy
import io
import itertools
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor

from fastmsflow import InputError, MultiScaleFlow
from fastmsflow.compat import accelerate, build_msflow_model, load_official, save_official
from fastmsflow.compat.drop_in import shared_condition
from fastmsflow.compat.state_dict_keys import official_fusion, official_parallel
from fastmsflow.errors import InputWarning
from fastmsflow.nn.positional_encoding import positional_encoding_2d
from tests.helpers.live_freia import (
    BLOCKS,
    CHANNELS,
    CONDITIONS,
    CONFIG,
    as_master,
    conditions,
    features,
    live_flows,
    loss_of,
    parameters,
    run,
)
from tests.helpers.ops_parity import DEVICE
from tests.helpers.parity import allowed, recording, relative_error
from tests.helpers.paths import GOLDEN
from tests.helpers.tolerances import FREIA_FLOAT32, GOLDEN_FLOAT32, ROUND_TRIP_FLOAT64


def config_of(name: str) -> tuple[SimpleNamespace, list[int]]:
    flow = load_official(GOLDEN / f"{name}.pt")
    clamp = recording(name)["config"]["clamp_alpha"]
    config = SimpleNamespace(c_conds=flow.condition_channels, parallel_blocks=flow.blocks, clamp_alpha=clamp)
    return config, list(flow.channels)


def load_into(parallel, fusion, content: dict) -> None:
    """Loads as MSFlow's loop does: not strictly."""
    for flow, state in zip(parallel, content["parallel_flows"], strict=True):
        flow.load_state_dict(state, strict=False)
    fusion.load_state_dict(content["fusion_flow"], strict=False)


@pytest.mark.parametrize("name", ["tiny", "odd"])
def test_the_swap_reproduces_the_recording_from_the_official_file(name: str) -> None:
    content, expected = torch.load(GOLDEN / f"{name}.pt", weights_only=True), recording(name)
    config, channels = config_of(name)
    parallel, fusion = build_msflow_model(config, channels)
    load_into(parallel, fusion, content)
    z, log_det = [], 0.0
    with torch.no_grad():
        for flow, x, d in zip(parallel, expected["pooled"], config.c_conds, strict=True):
            code = positional_encoding_2d(d, *x.shape[2:], dtype=x.dtype, device="cpu").repeat(len(x), 1, 1, 1)
            level, level_log_det = flow(x, [code])
            z, log_det = [*z, level], log_det + level_log_det
        z, fused = fusion(z)
    assert max(relative_error(a, b) for a, b in zip(z, expected["z"], strict=True)) < GOLDEN_FLOAT32
    assert relative_error(log_det + fused, expected["logdet"]) < GOLDEN_FLOAT32


def as_bytes(states: list[dict[str, Tensor]]) -> bytes:
    """The bytes that torch.save writes, but for the version numbers that a module's state dict carries beside it."""
    file = io.BytesIO()
    torch.save([dict(state) for state in states], file)
    return file.getvalue()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("name", ["tiny", "odd"])
def test_a_loaded_official_file_is_written_again_to_the_bit(name: str, order: tuple[int, ...]) -> None:
    content = torch.load(GOLDEN / f"{name}.pt", weights_only=True)
    state = content["fusion_flow"]
    for key in ("perm", "perm_inv"):
        entries = [state[f"module_list.{source}.{key}"] for source in order]
        state.update({f"module_list.{i}.{key}": entry for i, entry in enumerate(entries)})
    parallel, fusion = build_msflow_model(*config_of(name))
    before = set(map(id, parameters(parallel, fusion)))
    load_into(parallel, fusion, content)
    assert set(map(id, parameters(parallel, fusion))) == before
    states = [*content["parallel_flows"], state]
    assert as_bytes([flow.state_dict() for flow in (*parallel, fusion)]) == as_bytes(states)
    # Its loader reads the order of the permutations off here.
    lengths = [len(state[f"module_list.{i}.perm"]) for i in range(3)]
    assert [fusion.module_list[i].perm.shape[0] for i in range(3)] == lengths


def test_an_index_file_is_written_again_to_the_bit() -> None:
    content = index_content()
    parallel, fusion = build_msflow_model(CONFIG, CHANNELS, "0.2")
    load_into(parallel, fusion, content)
    states = [*content["parallel_flows"], content["fusion_flow"]]
    assert as_bytes([flow.state_dict() for flow in (*parallel, fusion)]) == as_bytes(states)


def test_levels_of_the_same_length_take_their_permutations_in_the_files_order() -> None:
    config = SimpleNamespace(c_conds=(8, 8, 8), parallel_blocks=(1, 1, 1), clamp_alpha=1.9)
    torch.manual_seed(0)
    _, saved = build_msflow_model(config, (16, 24, 16))
    state = saved.state_dict()
    for key in ("perm", "perm_inv"):
        entries = [state[f"module_list.{source}.{key}"] for source in (1, 2, 0)]
        state.update({f"module_list.{i}.{key}": entry for i, entry in enumerate(entries)})
    _, fusion = build_msflow_model(config, (16, 24, 16))
    fusion.load_state_dict(state)
    assert as_bytes([fusion.state_dict()]) == as_bytes([state])
    x = [torch.randn(2, c, 4, 4) for c in (16, 24, 16)]
    by_hand = [x[0][:, state["module_list.1.perm"]], x[1][:, state["module_list.0.perm"]]]
    by_hand.append(x[2][:, state["module_list.2.perm"]])
    with torch.no_grad():
        z, expected = fusion(x)[0], fusion.module_list[3](by_hand)[0]
    assert all(map(torch.equal, z, expected))


def test_an_optimizer_that_was_built_before_a_file_was_loaded_trains_what_was_loaded() -> None:
    parallel, fusion = build_msflow_model(*config_of("tiny"))
    optimizer = torch.optim.Adam(parameters(parallel, fusion), lr=1e-2)
    load_into(parallel, fusion, torch.load(GOLDEN / "tiny.pt", weights_only=True))
    before = [p.detach().clone() for p in parameters(parallel, fusion)]
    z, log_det = fusion([torch.randn(2, c, 4, 4) for c in config_of("tiny")[1]])
    (sum(level.square().sum() for level in z) - log_det.sum()).backward()
    optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(before, parameters(parallel, fusion), strict=True)]
    ours = {id(p) for p in fusion.parameters() if p.requires_grad}
    assert changed == [id(p) in ours for p in parameters(parallel, fusion)]


def test_parameters_stand_in_freias_order_with_its_shapes() -> None:
    live = live_flows()
    fast = build_msflow_model(CONFIG, CHANNELS, "0.2" if live[0][0].module_list[0].w_perm.ndim == 4 else "master")
    # FrEIA's graph has its permutations in any order; they are frozen, so only their number matters to an optimizer.
    shapes = [
        [tuple(p.shape) if p.requires_grad or p.ndim == 4 else None for p in parameters(*f)] for f in (live, fast)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("dense", [True, False], ids=["0.2", "master"])
def test_files_of_both_variants_are_read_with_their_formula(dense: bool, tmp_path: Path) -> None:
    torch.manual_seed(3)
    flow = MultiScaleFlow(CHANNELS, CONDITIONS, BLOCKS, clamp_form="tanh" if dense else "scaled_tanh").eval()
    save_official(flow, tmp_path / "official.pt")
    variant = "auto" if dense else "master"
    parallel, fusion = build_msflow_model(CONFIG, CHANNELS, variant)
    load_into(parallel, fusion, torch.load(tmp_path / "official.pt", weights_only=True))
    with torch.no_grad():
        z, log_det = run(parallel, fusion, features())
        expected, expected_log_det = flow(features())
    assert max(relative_error(a, b) for a, b in zip(z, expected, strict=True)) < FREIA_FLOAT32
    assert relative_error(log_det, expected_log_det) < FREIA_FLOAT32
    content = {
        "epoch": 0,
        "fusion_flow": fusion.state_dict(),
        "parallel_flows": [level.state_dict() for level in parallel],
    }
    torch.save(content, tmp_path / "again.pt")
    assert torch.equal(load_official(tmp_path / "again.pt", variant=variant)(features())[1], flow(features())[1])


def index_content() -> dict:
    """A file with index permutations."""
    torch.manual_seed(3)
    flow = MultiScaleFlow(CHANNELS, CONDITIONS, BLOCKS, clamp_form="scaled_tanh")
    return {
        "fusion_flow": official_fusion(flow),
        "parallel_flows": [official_parallel(flow, level) for level in range(3)],
    }


def test_an_index_file_is_warned_of_once_and_computed_by_freia_0_2s_formula() -> None:
    parallel, fusion = build_msflow_model(CONFIG, CHANNELS)
    with pytest.warns(InputWarning) as caught:
        load_into(parallel, fusion, index_content())
    (line,) = [str(warning.message) for warning in caught]
    assert line.startswith("the checkpoint has index permutations") and "\n" not in line
    assert "clamp tanh(r) is taken" in line and "variant='master'" in line and "fastmsflow verify FILE" in line
    named = build_msflow_model(CONFIG, CHANNELS, "0.2")
    load_into(*named, index_content())
    masters = build_msflow_model(CONFIG, CHANNELS, "master")
    load_into(*masters, index_content())
    with torch.no_grad():
        outputs = [run(*flows, features())[1] for flows in ((parallel, fusion), named, masters)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("variant", ["0.2", "master"])
def test_a_named_formula_takes_an_index_file_without_a_word(variant: str) -> None:
    load_into(*build_msflow_model(CONFIG, CHANNELS, variant), index_content())


def test_it_goes_backwards() -> None:
    parallel, fusion = build_msflow_model(CONFIG, CHANNELS)
    for flow in (*parallel, fusion):
        flow.double()
    x = features(dtype=torch.float64)
    with torch.no_grad():
        z, log_det = run(parallel, fusion, x)
        back, total = fusion(z, rev=True)
        for i, (flow, code) in enumerate(zip(parallel, conditions(3, torch.float64), strict=True)):
            back[i], part = flow(back[i], [code], rev=True)
            total = total + part
    assert max(relative_error(a, b) for a, b in zip(back, x, strict=True)) < ROUND_TRIP_FLOAT64
    assert relative_error(total, -log_det) < ROUND_TRIP_FLOAT64


def test_training_goes_on_after_inference_mode() -> None:
    parallel, fusion = live_flows()
    for flows in (accelerate(parallel, fusion), build_msflow_model(CONFIG, CHANNELS)):
        with torch.inference_mode():
            run(*flows, features())
        loss_of(*flows, features()).backward()
        assert all(p.grad is not None for p in parameters(*flows) if p.requires_grad)


@pytest.mark.parametrize("as_variant", [lambda flows: flows, as_master], ids=["installed", "master"])
def test_what_the_swap_saves_freias_modules_load_and_compute_the_same(as_variant, tmp_path: Path) -> None:
    live, fusion = live_flows()
    live = as_variant(live)
    variant = "0.2" if live[0].module_list[0].w_perm.ndim == 4 else "master"
    parallel, _ = build_msflow_model(CONFIG, CHANNELS, variant=variant)
    torch.save([flow.state_dict() for flow in parallel], tmp_path / "flows.pt")
    for flow, state in zip(live, torch.load(tmp_path / "flows.pt", weights_only=True), strict=True):
        flow.load_state_dict(state)
    with torch.no_grad():
        (ours, log_det), (theirs, expected) = (run(flows, fusion, features()) for flows in (parallel, live))
    assert max(relative_error(a, b) for a, b in zip(ours, theirs, strict=True)) < FREIA_FLOAT32
    assert relative_error(log_det, expected) < FREIA_FLOAT32


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda flow: pickle.loads(pickle.dumps(flow)), lambda flow: flow.to("cpu").train().eval()]
)
def test_a_copy_a_pickle_and_a_moved_flow_compute_the_same(how) -> None:
    parallel, fusion = build_msflow_model(CONFIG, CHANNELS)
    expected = run(parallel, fusion, features())[1]
    assert torch.equal(run([how(flow) for flow in parallel], how(fusion), features())[1], expected)


def test_safetensors_saves_and_loads_the_flows(tmp_path: Path) -> None:
    flows, others = (build_msflow_model(CONFIG, CHANNELS) for _ in range(2))
    for i, (flow, other) in enumerate(zip((*flows[0], flows[1]), (*others[0], others[1]), strict=True)):
        save_model(flow, tmp_path / f"{i}.safetensors")
        assert load_model(other, tmp_path / f"{i}.safetensors") == (set(), [])
    assert torch.equal(run(*others, features())[1], run(*flows, features())[1])


def test_kernels_compute_the_swap_too() -> None:
    parallel, fusion = build_msflow_model(CONFIG, CHANNELS, backend="torch")
    for flow in (*parallel, fusion):
        flow.to(DEVICE)
    x = [level[:1].to(DEVICE) for level in features()]
    z, log_det = run(parallel, fusion, x)
    for flow in (*parallel, fusion):
        flow.backend = "triton"
    ours, our_log_det = run(parallel, fusion, x)
    assert max(relative_error(a, b) for a, b in zip(ours, z, strict=True)) < allowed(FREIA_FLOAT32)
    assert relative_error(our_log_det, log_det) < allowed(FREIA_FLOAT32)


@pytest.mark.slow
def test_compiled_whole_it_computes_the_same() -> None:
    one_block_each = SimpleNamespace(**{**vars(CONFIG), "parallel_blocks": (1, 1, 1)})
    parallel, fusion = build_msflow_model(one_block_each, CHANNELS)
    expected = loss_of(parallel, fusion, features())
    compiled = torch.compile(lambda x: loss_of(parallel, fusion, x), fullgraph=True, backend="aot_eager")
    assert compiled(features()).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("make", [lambda c: c.repeat(3, 1, 1, 1), lambda c: c.expand(3, -1, -1, -1), lambda c: c])
def test_a_condition_that_all_images_share_is_found(make) -> None:
    condition = positional_encoding_2d(8, 3, 5, dtype=torch.float32, device="cpu")
    assert torch.equal(shared_condition(make(condition)), condition)


def test_conditions_of_their_own_are_kept() -> None:
    condition = torch.randn(3, 8, 3, 5)
    assert shared_condition(condition) is condition


def test_what_does_not_fit_raises_though_strict_is_off() -> None:
    parallel, fusion = build_msflow_model(CONFIG, CHANNELS)
    with pytest.raises(RuntimeError, match=r"module_list\.0\.global_scale"):
        parallel[0].load_state_dict({"weight": torch.zeros(1)}, strict=False)
    with pytest.raises(RuntimeError, match=r"module_list\.0\.perm"):
        fusion.load_state_dict({}, strict=False)


def test_a_fusion_of_fewer_levels_than_it_has_is_refused() -> None:
    _, fusion = build_msflow_model(CONFIG, CHANNELS)
    with pytest.raises(
        InputError, match=r"levels of \[16, 24\] channels given; this fusion flow permutes \[16, 24, 40\]"
    ):
        fusion(features()[:2])


def test_dense_permutations_with_masters_formula_are_refused() -> None:
    parallel, fusion = build_msflow_model(CONFIG, CHANNELS, variant="master")
    parallel[0].load_state_dict(build_msflow_model(CONFIG, CHANNELS)[0][0].state_dict())
    with pytest.raises(InputError, match=r"FrEIA 0\.2's"):
        run(parallel, fusion, features())


@pytest.mark.parametrize(
    ("config", "channels", "message"),
    [
        (SimpleNamespace(c_conds=CONDITIONS), CHANNELS, "parallel_blocks, clamp_alpha"),
        (CONFIG, (16, 24), "same number of levels"),
        (CONFIG, (16, 24, 41), "even"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(config, channels, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_msflow_model(config, channels)
