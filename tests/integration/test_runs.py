"""Runs are configured, logged, and stopped in time."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import yaml

from fastmsflow import InputError, MSFlow, UnavailableError
from fastmsflow.models.checkpoint import read_checkpoint
from fastmsflow.training.loggers import check_loggers
from tests.helpers.folder_listing import names_in
from tests.helpers.small_runs import train_args

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_downloads")]


def test_a_run_is_configured_by_the_file_that_an_earlier_one_left(
    runs: Path, two_classes: Path, command, tmp_path
) -> None:
    config = yaml.safe_load((runs / "a/config.yaml").read_text())
    assert config["hold-out"] == 0.2
    assert (config["class"], config["lr"], config["milestones"]) == ("a", 1e-3, [0.7, 0.9])
    code, out = command("train", "--config", runs / "a/config.yaml", "--out", tmp_path / "again", "--quiet")
    assert (code, out) == (0, "")
    first, again = (json.loads((folder / "results.json").read_text()) for folder in (runs / "a", tmp_path / "again"))
    assert again["nll"] == first["nll"]
    assert again["metrics"] == first["metrics"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("batch_sise: 4", "train has no option 'batch_sise'; did you mean 'batch_size'?"),
        ("zebra: 4", "train has no option 'zebra'; there are accumulate_grad_batches, activation_checkpointing,"),
        ("- 4", "holds a list; give one 'option: value' a line"),
        ("lr: [", "not YAML"),
    ],
)
def test_a_configuration_that_is_wrong_is_one_line(content: str, message: str, two_classes, command, tmp_path) -> None:
    (tmp_path / "c.yaml").write_text(content)
    code, out = command(
        "train", two_classes, "--class", "a", "--out", tmp_path / "out", "--config", tmp_path / "c.yaml"
    )
    assert code == 1
    assert out.strip().splitlines()[-1].startswith(f"fastmsflow: {tmp_path / 'c.yaml'}: {message}")
    assert not (tmp_path / "out").exists()


def test_a_configuration_may_say_how_a_verb_speaks(runs: Path, two_classes: Path, command, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"source: {two_classes}\nclass: a\njson: true\n")
    code, out = command("evaluate", "--config", tmp_path / "c.yaml", runs / "a")
    assert code == 0
    assert json.loads(out)["rows"]


def test_the_command_line_counts_more_than_the_file(runs: Path, command, tmp_path: Path) -> None:
    code, out = command(
        "train", "--config", runs / "a/config.yaml", "--out", tmp_path / "out", "--meta-epochs", 1, "--json"
    )
    assert code == 0
    assert len(json.loads(out)["nll"]) == 1
    assert yaml.safe_load((tmp_path / "out/config.yaml").read_text())["meta-epochs"] == 1


def test_training_stops_when_held_out_images_no_longer_gain(two_classes: Path, command, tmp_path: Path) -> None:
    # At a learning rate of nearly nothing no round is better than the one before by more than rounding.
    code, _ = command(*train_args(two_classes, tmp_path / "run", "--lr", 1e-30, "--meta-epochs", 9, "--patience", 2))
    assert code == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert [epoch_result["epoch"] for epoch_result in results["rounds"]] == [1, 2, 3]
    # If rounds are alike, the results and the files name the same one.
    chosen = results["metrics"]["image_auroc"]
    for how, file in {"last": "last", "best on test": "best_on_test", "chosen on held-out": "best"}.items():
        notes = read_checkpoint(tmp_path / f"run/{file}.safetensors")[1]["notes"]
        assert notes["epoch"] == chosen[how]["epoch"], how


def test_nothing_held_out_is_the_published_recipe(two_classes: Path, command, tmp_path: Path) -> None:
    code, out = command(*train_args(two_classes, tmp_path / "run", "--hold-out", 0))
    assert code == 0
    assert "no threshold: no images were held out" in out
    assert not (tmp_path / "run/best.safetensors").exists()
    assert MSFlow.load(tmp_path / "run/last.safetensors").calibration is None


def test_losses_are_logged_step_by_step(two_classes: Path, command, monkeypatch, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    code, _ = command(*train_args(two_classes, tmp_path / "run", "--logger", "csv", "--logger", "tensorboard"))
    assert code == 0
    with (tmp_path / "run/logs/csv/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["nll"]) for row in rows if row["nll"]]
    assert len(losses) == 18  # 43 images in batches of 8, three epochs
    expected = json.loads((tmp_path / "run/results.json").read_text())["nll"]
    assert sum(losses[:6]) / 6 == pytest.approx(expected[0], rel=1e-5)
    assert [float(row["held_out_nll"]) for row in rows if row["held_out_nll"]]
    assert list((tmp_path / "run/logs/tensorboard/version_0").glob("events.out.tfevents.*"))


def test_weights_and_biases_are_logged_to_without_a_network(
    two_classes: Path, command, monkeypatch, tmp_path: Path
) -> None:
    pytest.importorskip("wandb", reason="needs wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert command(*train_args(two_classes, tmp_path / "run", "--logger", "wandb"))[0] == 0
    assert list((tmp_path / "run/logs/wandb").glob("offline-run-*/*.wandb"))


def test_a_logger_that_is_not_known_or_not_there_is_one_line(monkeypatch) -> None:
    with pytest.raises(InputError, match="logger 'tensorbord' is not known; choose of csv, tensorboard, wandb"):
        check_loggers(["csv", "tensorbord"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="the logger wandb is not installed: pip install wandb"):
        check_loggers(["wandb"])


@pytest.mark.parametrize("bad", [False, True], ids=["good images", "a bad image"])
def test_a_configuration_of_ones_own_in_the_folder_is_left_alone(
    bad: bool, two_classes: Path, command, tmp_path
) -> None:
    copy = tmp_path / "tiles"
    shutil.copytree(two_classes / "a", copy / "a")
    if bad:
        (copy / "a/train/good/00.png").write_bytes(b"no image")
    mine = tmp_path / "run/config.yaml"
    mine.parent.mkdir()
    mine.write_text("lr: 0.001  # mine\n")
    code, text = command(*train_args(copy, mine.parent, "--config", mine))
    assert code == 1
    assert f"{mine}: would be written over; move it, or choose another folder" in text
    assert names_in(mine.parent) == {"config.yaml"}
    assert mine.read_text() == "lr: 0.001  # mine\n"
