"""Files that the published script resumes from: its Adam takes up where ours left off."""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from fastmsflow import InputError, MSFlow, MultiScaleFlow
from fastmsflow.cli import app
from fastmsflow.compat import build_msflow_model, load_official, save_official
from fastmsflow.compat.state_dict_keys import official_fusion, official_parallel
from fastmsflow.nn.positional_encoding import positional_encoding_2d
from fastmsflow.training import Recipe, checkpointing, load_state, train
from tests.helpers.live_freia import BLOCKS, CHANNELS, CONDITIONS, features, in_order_of, live_flows, loss_of
from tests.helpers.noise_images import noise_set
from tests.helpers.parity import relative_error
from tests.helpers.tolerances import RESUMED_STEP

LR = 1e-3


def by_part(flow: MultiScaleFlow) -> list[dict]:
    """Groups like a run's: one a part, each with a name."""
    parts = {**{f"level{i}": level for i, level in enumerate(flow.parallel_flows)}, "fusion": flow.fusion_flow}
    return [{"params": list(part.parameters()), "name": name} for name, part in reversed(parts.items())]


def trained(grouping=MultiScaleFlow.parameters, steps: int = 3, **options) -> tuple[MultiScaleFlow, torch.optim.Adam]:
    torch.manual_seed(0)
    flow = MultiScaleFlow(CHANNELS, CONDITIONS, BLOCKS, backend="torch")
    optimizer = torch.optim.Adam(grouping(flow), lr=LR, betas=(0.8, 0.99), **options)
    for seed in range(steps):
        step(flow, optimizer, seed)
    return flow, optimizer


def step(flow: MultiScaleFlow, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    flow.nll(features(seed=seed)).mean().backward()
    optimizer.step()


def script(fusion_first: bool) -> tuple[list[nn.Module], nn.Module, torch.optim.Adam]:
    """FrEIA's modules and an Adam over all of their parameters, frozen ones included."""
    parallel, fusion = live_flows(seed=8)
    parts = (fusion, *parallel) if fusion_first else (*parallel, fusion)
    return parallel, fusion, torch.optim.Adam([p for part in parts for p in part.parameters()], lr=1.0)


@pytest.mark.parametrize("fusion_first", [False, True], ids=["parallel first", "fusion first"])
@pytest.mark.parametrize(
    ("grouping", "options"),
    [(MultiScaleFlow.parameters, {}), (by_part, {"fused": True}), (by_part, {"amsgrad": True})],
    ids=["one group", "a group a part, fused", "amsgrad"],
)
def test_freias_modules_resume_and_their_next_step_is_ours(
    grouping, options: dict, fusion_first: bool, tmp_path: Path
) -> None:
    flow, optimizer = trained(grouping, **options)
    save_official(flow, tmp_path / "run.pt", 7, optimizer, fusion_first)
    content = torch.load(tmp_path / "run.pt", weights_only=True)
    parallel, fusion, theirs = script(fusion_first)
    for module, state in zip(parallel, content["parallel_flows"], strict=True):
        module.load_state_dict(state)
    fusion.load_state_dict(in_order_of(fusion, content["fusion_flow"]))
    theirs.load_state_dict(content["optimizer"])
    assert content["epoch"] == 7
    assert (theirs.param_groups[0]["lr"], theirs.param_groups[0]["betas"]) == (LR, (0.8, 0.99))
    assert not theirs.param_groups[0]["fused"]
    before = copy.deepcopy(flow)
    loss_of(parallel, fusion, features(seed=9)).backward()
    theirs.step()
    step(flow, optimizer, seed=9)
    moved = changes(flow, before, parallel, fusion)
    assert max(moved) < RESUMED_STEP
    # An Adam that begins anew goes elsewhere.
    unaware = copy.deepcopy(before)
    step(unaware, torch.optim.Adam(unaware.parameters(), lr=LR, betas=(0.8, 0.99)), seed=9)
    assert max(changes(unaware, before, parallel, fusion)) > 0.1


def changes(flow: MultiScaleFlow, before: MultiScaleFlow, parallel: list[nn.Module], fusion: nn.Module) -> list[float]:
    """The difference of the modules' last step from the flow's, by parameter, relative to that step."""
    errors = []
    pairs = [(official_parallel(flow, i), official_parallel(before, i), m) for i, m in enumerate(parallel)]
    pairs.append((official_fusion(flow), official_fusion(before), fusion))
    for after, start, module in pairs:
        theirs = dict(module.named_parameters())
        trainable = [key for key, p in theirs.items() if p.requires_grad]
        errors += [relative_error(after[key] - start[key], theirs[key].detach() - start[key]) for key in trainable]
    return errors


def test_an_optimizer_before_its_first_step_has_no_state(tmp_path: Path) -> None:
    flow, optimizer = trained(steps=0)
    save_official(flow, tmp_path / "run.pt", optimizer=optimizer)
    written = torch.load(tmp_path / "run.pt", weights_only=True)["optimizer"]
    assert written["state"] == {}
    *_, theirs = script(fusion_first=False)
    theirs.load_state_dict(written)
    assert theirs.param_groups[0]["lr"] == LR


def test_the_written_state_has_the_official_shapes_and_none_for_permutations(tmp_path: Path) -> None:
    flow, optimizer = trained(steps=1)
    save_official(flow, tmp_path / "run.pt", optimizer=optimizer)
    content = torch.load(tmp_path / "run.pt", weights_only=True)
    values = [value for state in (*content["parallel_flows"], content["fusion_flow"]) for value in state.items()]
    state, (group,) = content["optimizer"]["state"], content["optimizer"]["param_groups"]
    assert group["params"] == list(range(len(values)))
    for i, (key, value) in enumerate(values):
        if "perm" in key:
            assert i not in state
        else:
            assert state[i]["exp_avg"].shape == state[i]["exp_avg_sq"].shape == value.shape
            assert (state[i]["step"].item(), state[i]["step"].shape) == (1, ())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda flow: torch.optim.SGD(flow.parameters()), "the optimizer is SGD, and the published script's is Adam"),
        (lambda flow: torch.optim.AdamW(flow.parameters()), "the optimizer is AdamW"),
        (
            lambda flow: torch.optim.Adam(flow.fusion_flow.parameters()),
            r"holds \d+ of the flow's \d+ parameters, .*; train without frozen parts, or leave the optimizer out",
        ),
        (
            lambda flow: torch.optim.Adam([*flow.parameters(), nn.Parameter(torch.zeros(1))]),
            r"parameters and 1 others,",
        ),
        (
            lambda flow: torch.optim.Adam(
                [{"params": flow.parallel_flows.parameters()}, {"params": flow.fusion_flow.parameters(), "lr": 1e-5}]
            ),
            r"groups differ in lr, .*\(train without --part-lr\)",
        ),
        (
            lambda flow: torch.optim.Adam(flow.parameters(), weight_decay=1e-2, decoupled_weight_decay=True),
            "the optimizer is AdamW",
        ),
    ],
    ids=["SGD", "AdamW", "frozen parts", "others' parameters", "rates", "AdamW by another name"],
)
def test_an_optimizer_that_the_script_cannot_have_is_refused(make, message: str, tmp_path: Path) -> None:
    flow, _ = trained(steps=0)
    with pytest.raises(InputError, match=message) as caught:
        save_official(flow, tmp_path / "run.pt", optimizer=make(flow))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run.pt").exists()


def test_what_schedulers_and_names_put_into_groups_stays_out_of_the_file(tmp_path: Path) -> None:
    flow, _ = trained(steps=0)
    first, second = flow.parallel_flows.named_parameters(), flow.fusion_flow.named_parameters()
    optimizer = torch.optim.Adam([{"params": list(first), "betas": [0.9, 0.999], "note": "mine"}])
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
    optimizer.add_param_group({"params": list(second)})
    save_official(flow, tmp_path / "run.pt", optimizer=optimizer)
    (group,) = torch.load(tmp_path / "run.pt", weights_only=True)["optimizer"]["param_groups"]
    (plain,) = torch.optim.Adam(flow.parameters()).state_dict()["param_groups"]
    assert group.keys() == plain.keys()
    assert group["betas"] == (0.9, 0.999)


# Three steps to a sub-epoch; the state is saved after the sixteenth step, before the last evaluation's own.
RECIPE = Recipe(lr=LR, batch_size=4, meta_epochs=3, sub_epochs=2, warm_up=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder as it lies there shortly before it has finished, in the last of six sub-epochs."""
    images = noise_set(tmp_path_factory.mktemp("images"), train=12)
    out, unfinished = tmp_path_factory.mktemp("runs") / "run", tmp_path_factory.mktemp("copy") / "run"
    torch.manual_seed(0)
    model = MSFlow("test_resnet.r160_in1k", pretrained=False, image_size=(32, 32), blocks=(1, 1, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointing, "SAVE_SECONDS", 0.0)
        train(model, images, RECIPE, out, report=lambda result: shutil.copytree(out, unfinished) and None)
    assert not (out / "state.ckpt").exists()
    return unfinished


def run_features(flow: MultiScaleFlow, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, c, 2, 2, generator=generator) for c in flow.channels]


def test_a_runs_state_is_its_weights_its_optimizer_and_its_completed_meta_epochs(run: Path) -> None:
    flow, optimizer, epoch = load_state(run / "state.ckpt")
    content = torch.load(run / "state.ckpt", weights_only=True)
    assert len(content["fastmsflow"]["epoch_losses"]) == 5 and epoch == 2
    assert not flow.training
    for key, value in flow.state_dict().items():
        assert torch.equal(value, content["state_dict"][f"model.flow.{key}"]), key
    steps = {state["step"].item() for state in optimizer.state.values()}
    assert steps == {content["global_step"]} == {16}
    assert set(optimizer.state) == set(flow.parameters())


def test_the_script_resumes_from_a_converted_state(run: Path, tmp_path: Path) -> None:
    for options, fusion_first in (((), False), (("--fusion-first",), True)):
        result = CliRunner().invoke(app, ["convert", str(run / "state.ckpt"), str(tmp_path / "run.pt"), *options])
        assert result.exit_code == 0, result.output
        assert "with the optimizer's state: the published script can resume from it" in result.output
        flow, optimizer, epoch = load_state(run / "state.ckpt")
        content = torch.load(tmp_path / "run.pt", weights_only=True)
        assert content["epoch"] == epoch == 2
        config = SimpleNamespace(c_conds=flow.condition_channels, parallel_blocks=flow.blocks, clamp_alpha=flow.clamp)
        parallel, fusion = build_msflow_model(config, flow.channels)
        parts = (fusion, *parallel) if fusion_first else (*parallel, fusion)
        theirs = torch.optim.Adam([p for part in parts for p in part.parameters()])
        for module, state in zip(
            (*parallel, fusion), (*content["parallel_flows"], content["fusion_flow"]), strict=True
        ):
            module.load_state_dict(state)
        theirs.load_state_dict(content["optimizer"])
        before, x = copy.deepcopy(flow), run_features(flow, seed=3)
        conditions = [
            positional_encoding_2d(d, 2, 2, dtype=torch.float32, device="cpu") for d in flow.condition_channels
        ]
        z, log_dets = zip(*(m(y, [c]) for m, y, c in zip(parallel, x, conditions, strict=True)), strict=True)
        z, log_det = fusion(list(z))
        (0.5 * sum(y.square().sum(dim=(1, 2, 3)) for y in z) - log_det - sum(log_dets)).mean().backward()
        theirs.step()
        optimizer.zero_grad()
        flow.nll(x).mean().backward()
        optimizer.step()
        assert max(changes(flow, before, parallel, fusion)) < RESUMED_STEP


def test_a_finished_runs_model_is_converted_with_a_word_on_the_missing_optimizer(run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["convert", str(run / "last.safetensors"), str(tmp_path / "last.pt")])
    assert result.exit_code == 0, result.output
    assert "without an optimizer's state" in result.output and "but not resume from it" in result.output
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    assert content["epoch"] == 3 and "optimizer" not in content


def test_a_state_that_is_not_there_or_not_whole_is_one_line(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    state, settings = folder / "state.ckpt", folder / "state-settings.json"

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            load_state(state)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)

    whole = state.read_bytes()
    state.write_bytes(whole[:1000])
    refused("damaged, or holds code, which is not run")
    torch.save({"state_dict": {}}, state)
    refused("not a run's state")
    content = torch.load(run / "state.ckpt", weights_only=True)
    del content["optimizer_states"]
    torch.save(content, state)
    refused(r"not a run's state \(optimizer_states is missing\)")
    for damage in (
        lambda c: c["optimizer_states"][0]["param_groups"].pop(),
        lambda c: c["optimizer_states"][0]["param_groups"][0]["params"].pop(),
        lambda c: next(iter(c["optimizer_states"][0]["state"].values())).update(exp_avg=torch.zeros(3, 1)),
        lambda c: c.update(state_dict=[]),
        lambda c: c.update(state_dict={1: 2}),
        lambda c: c.update(fastmsflow=None),
    ):
        content = torch.load(run / "state.ckpt", weights_only=True)
        damage(content)
        torch.save(content, state)
        refused("not a run's state|does not fit")
    state.write_bytes(whole)
    written = json.loads(settings.read_text())
    for damaged in ([], {}, {**written, "model": {**written["model"], "official_layout": {"order": [0, 0, 7]}}}):
        settings.write_text(json.dumps(damaged))
        refused("state-settings.json: damaged")
    settings.write_text(json.dumps({**written, "recipe": {**written["recipe"], "warm_up": 0.12}}))
    refused("warm_up is 0.12")
    settings.write_text("{")
    refused("damaged .*; a run's state is read with this file beside it")
    settings.unlink()
    refused("missing; a run's state is read with this file beside it")
    settings.write_text(json.dumps(written))
    state.unlink()
    refused("no such file; a run keeps its state until it has finished")


def test_a_standardised_runs_state_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    settings = json.loads((run / "state-settings.json").read_text())
    settings["model"]["standardise"] = True
    (tmp_path / "run/state-settings.json").write_text(json.dumps(settings))
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "run/state.ckpt"), str(tmp_path / "run.pt")])
    assert isinstance(result.exception, InputError) and "standardised" in str(result.exception)
    assert not (tmp_path / "run.pt").exists()


def test_an_official_file_that_was_gone_on_with_keeps_its_layout(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    settings = json.loads((run / "state-settings.json").read_text())
    settings["model"]["official_layout"] = {"order": [2, 0, 1], "dense": False}
    (tmp_path / "run/state-settings.json").write_text(json.dumps(settings))
    flow, optimizer, epoch = load_state(tmp_path / "run/state.ckpt")
    save_official(flow, tmp_path / "run.pt", epoch, optimizer)
    assert load_official(tmp_path / "run.pt", variant="0.2").official_layout == ((2, 0, 1), False)
