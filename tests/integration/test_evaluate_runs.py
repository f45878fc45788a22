"""Tests that a run's checkpoints are evaluated, compared and calibrated from the command line."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastmsflow import MSFlow
from fastmsflow.evaluation.compare_checkpoints import CheckpointResult, mean_of
from fastmsflow.metrics import auroc
from fastmsflow.training import Evaluation
from tests.helpers.folder_listing import names_in

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_downloads")]


def test_evaluate_shows_a_runs_checkpoints_side_by_side(runs: Path, two_classes: Path, command, tmp_path: Path) -> None:
    code, out = command("evaluate", runs / "a", two_classes, "--class", "a", "--out", tmp_path)
    assert code == 0
    for heading in ("chosen on held-out", "last", "best on test", "false-alarm rate", "F1"):
        assert heading in out
    rows = json.loads((tmp_path / "metrics.json").read_text())
    assert [row["checkpoint"] for row in rows] == ["chosen on held-out", "last", "best on test"]
    with (tmp_path / "metrics.csv").open() as file:
        assert [float(row["image_auroc"]) for row in csv.DictReader(file)] == [row["image_auroc"] for row in rows]
    with (tmp_path / "scores.csv").open() as file:
        scores = list(csv.DictReader(file))
    labels, absolute = ([float(row[key]) for row in scores] for key in ("label", "absolute_score"))
    assert rows[0]["image_auroc_absolute"] == pytest.approx(auroc(labels, absolute))
    threshold = MSFlow.load(runs / "a/best.safetensors").calibration.threshold().value
    called = [score > threshold for score in absolute]
    alarms = sum(c for c, label in zip(called, labels, strict=True) if not label)
    assert rows[0]["false_alarm_rate"] == alarms / 10
    assert (rows[0]["threshold_value"], rows[0]["threshold_false_alarms"]) == (threshold, 0.1)
    assert rows[0]["f1"] == pytest.approx(2 * (sum(called) - alarms) / (8 + sum(called)))
    pixel = MSFlow.load(runs / "a/best.safetensors").calibration.pixel_threshold()
    assert {f"pixel_threshold_{name}": value for name, value in pixel.as_dict().items()}.items() <= rows[0].items()
    assert f"pixel threshold: {pixel}; reached on the good test images: {rows[0]['false_pixel_rate']:.3%}" in out
    assert f"Pixel threshold: {pixel};" in (tmp_path / "report.html").read_text()
    assert all(Path(row["image"]).name in (tmp_path / "report.html").read_text() for row in scores)


def test_evaluate_of_all_classes_ends_with_the_mean(runs: Path, two_classes: Path, command, tmp_path: Path) -> None:
    code, out = command("evaluate", runs, two_classes, "--class", "all", "--out", tmp_path, "--json")
    assert code == 0
    rows = json.loads(out)["rows"]
    assert [row["class"] for row in rows] == ["a"] * 3 + ["b"] * 3 + ["mean"] * 3
    for checkpoint in ("last", "chosen on held-out", "best on test"):
        a, b, mean = (row["image_auroc"] for row in rows if row["checkpoint"] == checkpoint)
        assert mean == pytest.approx((a + b) / 2)
    assert names_in(tmp_path) == {"a", "b", "metrics.csv", "metrics.json"}
    seconds = json.loads(out)["seconds"]
    assert list(seconds) == ["load", "extractor", "flow", "metrics", "report"]


def test_evaluate_at_another_rate_of_false_alarms(runs: Path, two_classes: Path, command) -> None:
    found = []
    for rate in (0.1, 0.5):
        code, out = command("evaluate", runs / "a", two_classes, "--class", "a", "--false-alarms", rate, "--json")
        assert code == 0
        found.append(json.loads(out)["rows"][0]["recall"])
    assert found[0] <= found[1]
    code, out = command("evaluate", runs / "a", two_classes, "--class", "a", "--false-alarms", 0.01)
    assert code == 1
    assert "needs 99 held-out good images, and there are 10: give more, or allow 9.10%" in out


def test_evaluate_at_another_rate_of_false_pixels(runs: Path, two_classes: Path, command, tmp_path: Path) -> None:
    arguments = ("evaluate", runs / "a/last.safetensors", two_classes, "--class", "a", "--out", tmp_path / "out")
    rows = []
    for rate in (0.001, 0.1):
        code, out = command(*arguments, "--false-pixels", rate, "--json")
        assert code == 0
        rows += json.loads(out)["rows"]
    assert [row["pixel_threshold_false_pixels"] for row in rows] == [0.001, 0.1]
    assert rows[0]["pixel_threshold_value"] > rows[1]["pixel_threshold_value"]
    assert rows[0]["false_pixel_rate"] < rows[1]["false_pixel_rate"]

    model = MSFlow.load(runs / "a/last.safetensors")
    model.calibration = replace(model.calibration, pixels=None)
    model.save(tmp_path / "earlier.safetensors")
    code, out = command("evaluate", tmp_path / "earlier.safetensors", *arguments[2:], "--false-pixels", 0.01)
    assert code == 1
    assert "no threshold of pixels, since an earlier version calibrated this model: `fastmsflow calibrate" in out


def test_the_rate_that_too_few_images_are_told_to_allow_is_one_that_they_do_for(
    runs: Path, two_classes: Path, command
) -> None:
    arguments = ("evaluate", runs / "a", two_classes, "--class", "a", "--false-alarms")
    _, out = command(*arguments, 0.01)
    allowed = out.strip().splitlines()[-1].rpartition("or allow ")[2]
    assert command(*arguments, float(allowed.rstrip("%")) / 100)[0] == 0


def test_all_classes_of_a_set_that_has_none_or_of_runs_that_lack_one_are_refused_before_anything_is_scored(
    runs: Path, two_classes: Path, command, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(MSFlow, "load", lambda path: pytest.fail("a model was read"))
    (tmp_path / "runs").mkdir()
    shutil.copytree(runs / "a", tmp_path / "runs/a")
    for folder, images, message in (
        (runs, two_classes / "a", f"{two_classes / 'a'}: holds no classes"),
        (runs, tmp_path / "nowhere", "nowhere: holds no classes, or is not there"),
        (tmp_path / "runs", two_classes, f"{tmp_path / 'runs/b'}: not there; give a checkpoint or the folder of a run"),
    ):
        code, out = command("evaluate", folder, images, "--class", "all", "--out", tmp_path / "out")
        assert code == 1
        assert message in out.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_mean_is_of_all_classes_or_not_given() -> None:
    rows = [
        CheckpointResult(name, how, Evaluation(0.5, 0.5, 0.5)) for name, how in (("a", "x"), ("a", "y"), ("b", "x"))
    ]
    assert [row.checkpoint for row in mean_of(rows)] == ["x"]


def test_a_folder_for_a_model_is_one_line(runs: Path, two_classes: Path, command) -> None:
    for verb in ("calibrate", "predict"):
        code, out = command(verb, runs / "a", two_classes / "a/test/good")
        assert code == 1
        assert f"{runs / 'a'}: a folder; give the checkpoint in it, e.g. best.safetensors of a run" in out


@pytest.mark.parametrize("verb", ["evaluate", "calibrate"])
def test_images_whose_score_is_not_finite_are_named(
    verb: str, runs: Path, two_classes: Path, command, tmp_path
) -> None:
    model = MSFlow.load(runs / "a/last.safetensors")
    with torch.no_grad():
        model.flow.parallel_flows[0].blocks[0].global_offset.fill_(float("nan"))
    model.save(tmp_path / "nan.safetensors")
    arguments = (two_classes, "--class", "a") if verb == "evaluate" else (two_classes / "a/test/good",)
    code, out = command(verb, tmp_path / "nan.safetensors", *arguments)
    assert code == 1
    assert f"the score is not finite of {two_classes / 'a/test/good/48.png'}; " in out.strip().splitlines()[-1]


def test_good_test_images_unlike_those_held_out_are_pointed_out(
    runs: Path, two_classes: Path, command, tmp_path
) -> None:
    """Class b's good images, judged by what class a's score."""
    model = tmp_path / "model.safetensors"
    shutil.copy(runs / "a/best.safetensors", model)
    assert "near-copies" not in command("evaluate", model, two_classes, "--class", "a")[1]
    code, out = command("evaluate", model, two_classes, "--class", "b")
    assert code == 0
    assert "10 of 10 good test images are above the threshold, more than by chance" in out


def test_calibrate_counts_an_image_once(runs: Path, two_classes: Path, command, tmp_path: Path) -> None:
    folder = two_classes / "a/test/good"
    arguments = (folder, folder, folder / "48.png", "--false-alarms", 0.1, "--out", tmp_path / "m.safetensors")
    code, out = command("calibrate", runs / "a/best.safetensors", *arguments, "--json")
    assert code == 0
    assert json.loads(out)["threshold"]["images"] == 10


def test_calibrate_sets_the_threshold_of_a_model_and_keeps_what_it_says_of_itself(
    runs: Path, two_classes: Path, command, tmp_path: Path
) -> None:
    model = tmp_path / "model.safetensors"
    shutil.copy(runs / "a/best.safetensors", model)
    rates = ("--false-alarms", 0.05, "--false-pixels", 0.02)
    code, out = command("calibrate", model, two_classes / "a/train/good", *rates, "--json")
    assert code == 0
    said = json.loads(out)["threshold"]
    calibrated = MSFlow.load(model)
    assert calibrated.calibration.threshold().as_dict() == said
    assert (said["images"], said["false_alarms"]) == (48, 0.05)
    pixel = json.loads(out)["pixel"]
    assert calibrated.calibration.pixel_threshold().as_dict() == pixel
    assert (pixel["images"], pixel["false_pixels"]) == (48, 0.02)
    # The threshold is the second largest of 48: one is above.
    assert sum(score > said["value"] for score in calibrated.calibration.scores) == 1


def test_calibrate_with_too_few_images_leaves_the_model_as_it_was(
    runs: Path, two_classes: Path, command, tmp_path
) -> None:
    model = tmp_path / "model.safetensors"
    shutil.copy(runs / "a/best.safetensors", model)
    before = model.read_bytes()
    code, out = command("calibrate", model, two_classes / "a/test/good", "--false-alarms", 0.05)
    assert code == 1
    assert "needs 19 held-out good images, and there are 10" in out
    assert model.read_bytes() == before


def test_evaluate_leaves_its_report_beside_the_checkpoints(
    runs: Path, two_classes: Path, command, tmp_path: Path
) -> None:
    model = tmp_path / "model.safetensors"
    shutil.copy(runs / "a/last.safetensors", model)
    assert command("evaluate", model, two_classes, "--class", "a", "--quiet") == (0, "")
    made = names_in(tmp_path / "evaluation")
    assert made == {"heatmaps.png", "metrics.csv", "metrics.json", "report.html", "scores.csv", "scores.png"}
