"""Files that were written before names and files moved are still read: a checkpoint, a run, an interrupted run."""

import csv
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from fastmsflow import MSFlow
from fastmsflow.data import load_image
from fastmsflow.training import Recipe, load_state
from tests.helpers.paths import GOLDEN
from tests.helpers.tolerances import OLD_RUN

pytestmark = pytest.mark.slow

RECORDED = GOLDEN / "old_0_1/runs.tar.xz"


@pytest.fixture(scope="session")
def recorded(tmp_path_factory) -> Path:
    """images/, finished/, interrupted/: see golden/old_0_1/record.py."""
    root = tmp_path_factory.mktemp("old")
    with tarfile.open(RECORDED) as archive:
        archive.extractall(root, filter="data")
    return root


@pytest.fixture
def small_models(recorded: Path, monkeypatch) -> None:
    """New models are as small as the recorded ones, with their extractor's weights."""
    extractor = MSFlow.load(recorded / "interrupted/last.safetensors").extractor.state_dict()
    made = MSFlow.__init__

    def small(self, *arguments, **options) -> None:
        if arguments or "blocks" in options:
            made(self, *arguments, **options)
            return
        made(self, blocks=(1, 1, 1), condition_channels=(4, 4, 4), **options | {"pretrained": False})
        self.extractor.load_state_dict(extractor)

    monkeypatch.setattr(MSFlow, "__init__", small)


def test_an_old_checkpoint_scores_as_it_did(recorded: Path) -> None:
    model = MSFlow.load(recorded / "finished/last.safetensors")
    assert model.standardiser is not None
    assert model.calibration is not None and model.calibration.is_enough()
    with (recorded / "finished/scores.csv").open() as file:
        for row in csv.DictReader(file):
            prediction = model.predict(load_image(recorded / row["image"], model.image_size)[None])
            for name in ("score", "log_score", "absolute_score"):
                torch.testing.assert_close(
                    getattr(prediction, name).item(), float(row[name]), rtol=OLD_RUN, atol=OLD_RUN, msg=row["image"]
                )


def test_an_old_finished_run_is_evaluated_as_it_was(recorded: Path, command, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(recorded)
    code, output = command("evaluate", "finished", "images", "--out", tmp_path)
    assert code == 0, output
    before = json.loads((recorded / "finished/evaluation/metrics.json").read_text())
    now = json.loads((tmp_path / "metrics.json").read_text())
    assert len(now) == len(before)
    for row, old in zip(now, before, strict=True):
        for key, value in old.items():
            assert row[key] == (pytest.approx(value, rel=OLD_RUN) if isinstance(value, float) else value), key


def test_an_old_finished_run_is_not_written_over(recorded: Path, command, monkeypatch, small_models) -> None:
    monkeypatch.chdir(recorded)
    code, output = command("train", "images", "--config", "finished/config.yaml", "--out", "finished", "--resume")
    assert code == 1
    assert "finished: holds a finished run" in output


def test_an_old_interrupted_run_is_resumed_to_the_losses_of_the_whole_one(
    recorded: Path, command, monkeypatch, small_models, tmp_path: Path
) -> None:
    shutil.copytree(recorded / "interrupted", tmp_path / "run")
    monkeypatch.chdir(recorded)
    settings = tmp_path / "run/config.yaml"
    code, output = command("train", "images", "--config", settings, "--out", tmp_path / "run", "--resume")
    assert code == 0, output
    before, now = (json.loads((run / "results.json").read_text()) for run in (recorded / "finished", tmp_path / "run"))
    assert now["nll"] == pytest.approx(before["nll"], rel=OLD_RUN)
    assert now["nll"][:2] == before["nll"][:2], "the first round is not trained again"
    assert [row["epoch"] for row in now["rounds"]] == [2, 4, 6]
    for row, old in zip(now["rounds"], before["rounds"], strict=True):
        assert row["held_out_nll"] == pytest.approx(old["held_out_nll"], rel=OLD_RUN)
    # The recipe was recorded under the names of its fields then.
    assert Recipe(**now["recipe"]) == Recipe(**before["recipe"])


def test_an_old_state_is_read_without_its_run(recorded: Path) -> None:
    state = load_state(recorded / "interrupted/state.ckpt")
    assert state.epoch == 1
    assert [group["name"] for group in state.optimizer.param_groups] == ["level0", "level1", "level2"]
