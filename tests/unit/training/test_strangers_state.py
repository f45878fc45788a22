"""States of strangers' runs, each key changed to every other type: one line, whether they are resumed or converted."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmsflow import InputError
from fastmsflow.training.checkpointing import ResumeCheckpoint
from fastmsflow.training.read_run_state import _settings, load_state
from fastmsflow.training.run_directory import open_run_directory, refuse_another
from fastmsflow.training.state_format import check_state
from tests.helpers.memory_limit import memory_limit
from tests.helpers.mutations import line_of, mutations, refused
from tests.helpers.noise_images import noise_set
from tests.helpers.small_runs import run, untrained

RAW = ("", "{", "[]", "5", "null", '"x"', "[" * 10**5, '{"a":' * 10**5, "9" * 5000)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted after its first round, in ``run``."""
    root = tmp_path_factory.mktemp("root")
    noise_set(root / "images", train=8, test=1)
    shutil.rmtree(root / "images/test")

    def keep_and_fail(self, trainer, module) -> None:
        trainer.save_checkpoint(self._path)
        raise InputError("pulled the plug")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResumeCheckpoint, "on_train_epoch_end", keep_and_fail)
        assert "pulled the plug" in refused(lambda: train(root))
    return root


def train(root: Path, *more: str) -> None:
    with untrained():
        run(
            "train", root / "images/train", "--out", root / "run", "--extractor", "test_resnet.r160_in1k",
            "--image-size", 32, "--batch-size", 4, "--meta-epochs", 2, "--sub-epochs", 1, "--hold-out", 0.25,
            "--quiet", *more,
        )  # fmt: skip


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root / "run", tmp_path / "run"))


def content_of(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "state.ckpt", weights_only=True)


def test_every_key_of_a_state(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmsflow.training import state_format

    content, path = content_of(copy), copy / "state.ckpt"
    own = content["fastmsflow"]
    outside = {key: 0 for key in content if key not in ("epoch", "global_step")}
    changes = [
        (what, {**content, **{key: changed[key] for key in outside if changed[key] != 0}})
        for what, _, changed in mutations(outside)
    ]
    changes += [
        (f"{what} of our own", {**content, "fastmsflow": {**own, **{k: v for k, v in changed.items() if v != 0}}})
        for what, _, changed in mutations(dict.fromkeys(own, 0))
    ]
    changes += [(f"no {key}", {k: v for k, v in content.items() if k != key}) for key in content]
    changes += [
        (f"{key} = {value!r}", {**content, key: value})
        for key in ("epoch", "global_step")
        for value in (-1, True, 0.5, 10**30, "x", None, [], {})
    ]
    empty = ("callbacks = {}", "state_dict = {}", "epoch_losses = []", "losses = {", "moments = []", "random_cuda = []")
    for what, changed in changes:
        # This stands for what torch.load returns: the test of another file has real ones.
        monkeypatch.setattr(state_format, "load_pickled", lambda path, mapped, changed=changed: changed)
        line = line_of(lambda: check_state(path))
        taken = what.startswith((*empty, "loops = {}", "pytorch-lightning_version = '"))
        assert line is not None or taken, what
        assert line is None or line.startswith(f"{path}: not a run's state ("), what


RESTORED: dict[str, Callable[[dict[str, Any]], object]] = {
    "loops": lambda c: c["loops"].clear(),
    "a loop": lambda c: c["loops"]["fit_loop"].update({"epoch_progress": 5}),
    "a version": lambda c: c.update({"pytorch-lightning_version": "x"}),
    "a schedule": lambda c: c["lr_schedulers"][0].update(base_lrs=5),
    "a group": lambda c: c["optimizer_states"][0]["param_groups"][0].update(params=[]),
    "a moment": lambda c: c["optimizer_states"][0]["state"][0].update(exp_avg=torch.zeros(3)),
    "a parameter": lambda c: c["optimizer_states"][0]["state"].update({10**6: {"step": torch.zeros(())}}),
    "a weight": lambda c: c["state_dict"].pop("model.flow.fusion_flow.subnet_1.conv1.weight"),
    "a permutation": lambda c: c["state_dict"]["model.flow.fusion_flow.perm0"].zero_(),
    "losses": lambda c: c["fastmsflow"].update(losses={"totals": 5}),
    "random numbers": lambda c: c["fastmsflow"].update(random=torch.zeros(3)),
}


@pytest.mark.parametrize("kind", RESTORED)
def test_what_does_not_fit_is_one_line_when_it_is_resumed(kind: str, root: Path, copy: Path) -> None:
    shutil.copytree(root / "images", copy.parent / "images")
    content = content_of(copy)
    RESTORED[kind](content)
    torch.save(content, copy / "state.ckpt")
    line = refused(lambda: train(copy.parent, "--resume"))
    assert "remove it to begin the run again" in line or "is no permutation" in line


class Code:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("ran",)


def test_code_in_a_state_is_neither_run_nor_recommended(copy: Path, tmp_path: Path, monkeypatch) -> None:
    """PyTorch's own message says how to load the file all the same."""
    monkeypatch.chdir(tmp_path)
    path = copy / "state.ckpt"
    for content in ({"state_dict": Code()}, {**content_of(copy), "extra": Code()}):
        torch.save(content, path)
        for use in (lambda: check_state(path), lambda: load_state(path)):
            assert "damaged, or holds code, which is not run (UnpicklingError)" in refused(use)
    path.write_bytes(b"nothing")
    assert refused(lambda: check_state(path)).startswith(f"{path}: damaged")
    assert not (tmp_path / "ran").exists()


def test_every_key_of_a_runs_settings(copy: Path) -> None:
    path = copy / "state-settings.json"
    content = json.loads(path.read_text())
    needed = {key: content[key] for key in ("recipe", "model")}
    free = ("recipe.", "model.notes", "model.calibration = None", "model.official_layout")
    for what, is_other, changed in mutations(needed):
        path.write_text(json.dumps({**content, **changed}))
        line = line_of(lambda: _settings(copy / "state.ckpt"))
        assert line is not None or not is_other or what.startswith(free) or what == "recipe = {}", what
    for raw in RAW:
        path.write_text(raw)
        assert refused(lambda: load_state(copy / "state.ckpt")).startswith(f"{path}: damaged (")
        assert refused(lambda: open_run_directory(copy, True, content).__enter__()).startswith(f"{path}: damaged (")


def test_a_runs_settings_that_its_weights_do_not_bear_out(copy: Path) -> None:
    path = copy / "state-settings.json"
    content = json.loads(path.read_text())
    content["model"]["flow"]["blocks"] = [1, 1, 10**9]
    path.write_text(json.dumps(content))
    with memory_limit():
        assert "does not hold the 1000000000 blocks of level 2" in refused(lambda: load_state(copy / "state.ckpt"))


def test_a_finished_runs_results_that_are_damaged(tmp_path: Path) -> None:
    for raw in RAW:
        (tmp_path / "results.json").write_text(raw)
        assert refused(lambda: refuse_another(tmp_path, {})).startswith(f"{tmp_path}/results.json: damaged (")


def test_settings_that_are_nested_deep_are_one_line(copy: Path) -> None:
    depth = 900
    (copy / "state-settings.json").write_text('{"a":' * depth + "1" + "}" * depth)
    assert refused(lambda: open_run_directory(copy, True, {"b": 1}).__enter__())
