"""Checkpoints under changed light: metrics, the threshold's rates, the files, the pictures and the command's tables."""

import csv
import json
import warnings
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmsflow import MSFlow
from fastmsflow.calibration import Calibration
from fastmsflow.cli.corruption_table import print_corruption
from fastmsflow.cli.output import console
from fastmsflow.data import load_image
from fastmsflow.data.light import LIGHT_CORRUPTIONS
from fastmsflow.errors import InputWarning
from fastmsflow.evaluation import corruption
from fastmsflow.evaluation.compare_checkpoints import MEAN, CheckpointComparison, CheckpointResult, compare_checkpoints
from fastmsflow.evaluation.corruption import (
    CLEAN,
    WORST,
    CorruptionReport,
    CorruptionResult,
    evaluate_corruptions,
    mean_over_classes,
    worst_evaluation,
    write_corruption,
)
from fastmsflow.evaluation.corruption_pictures import SIDE, write_pictures
from fastmsflow.evaluation.results import METRICS, Evaluation
from fastmsflow.evaluation.score_map_store import ScoreMapStore
from fastmsflow.inference.tiled_models import TileOptions
from fastmsflow.metrics import auroc
from fastmsflow.scoring import Scores
from tests.helpers.folder_listing import names_in
from tests.helpers.tiny_model import tiny_model
from tests.helpers.tolerances import OPERATION_CLOSE

pytestmark = pytest.mark.slow

SIZE = (32, 32)
GOOD, DEFECTIVE = 5, 4
ORDER = [CLEAN, *LIGHT_CORRUPTIONS, MEAN, WORST]


def make_class(root: Path, seed: int) -> None:
    """Smooth images of 48x40, of which the defective ones have a white square; one mask is lost at 32x32."""
    random = np.random.default_rng(seed)
    for folder in ("train/good", "test/good", "test/spot", "ground_truth/spot"):
        (root / folder).mkdir(parents=True)
    for number in range(1 + GOOD + DEFECTIVE):
        coarse = Image.fromarray(random.integers(60, 150, (6, 5, 3), np.uint8))
        pixels = np.asarray(coarse.resize((40, 48), Image.Resampling.BICUBIC)).copy()
        name = f"{number}.png"
        if number <= GOOD:
            folder = "test/good" if number else "train/good"
        else:
            folder, mask = "test/spot", np.zeros((48, 40), np.uint8)
            pixels[10:24, 8:20], mask[10:24, 8:20] = 255, 255
            if number == GOOD + 1:
                mask[40, 30] = 255
            Image.fromarray(mask).save(root / "ground_truth/spot" / f"{number}_mask.png")
        Image.fromarray(pixels).save(root / folder / name)


def scores_of(model: MSFlow, paths: list[Path], change: str) -> Scores:
    pixels = [load_image(path, SIZE) for path in paths]
    if change in LIGHT_CORRUPTIONS:
        light = LIGHT_CORRUPTIONS[change]
        pixels = [light.for_image(number)(image) for number, image in enumerate(pixels)]
    with torch.no_grad():
        return model.eval().scores(torch.stack(pixels))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Classes a and b, and a run's folder for each in ``runs``: two checkpoints whose flows differ."""
    root = tmp_path_factory.mktemp("light")
    for seed, name in enumerate("ab"):
        make_class(root / "images" / name, seed)
        (root / "runs" / name).mkdir(parents=True)
        for file, factor in (("best", 1.0), ("last", 1.1)):
            model = tiny_model()
            with torch.no_grad():
                for parameter in model.flow.parameters():
                    parameter.mul_(factor)
            good = scores_of(model, sorted((root / "images" / name / "test/good").iterdir()), CLEAN).absolute_score
            model.calibration = Calibration(tuple(good.tolist()), (float(good.max()),) * GOOD, 0.5, 0.4)
            model.save(root / "runs" / name / f"{file}.safetensors")
    return root


@pytest.fixture(scope="module")
def compared(root: Path, tmp_path_factory) -> tuple[CheckpointComparison, CorruptionReport]:
    folder = tmp_path_factory.mktemp("maps")
    store = ScoreMapStore(folder)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        comparison = compare_checkpoints(root / "runs/a", str(root / "images"), "a", maps=store)
    with warnings.catch_warnings():
        # What the images as they are have told is not told once more for each change.
        warnings.simplefilter("error", InputWarning)
        return comparison, evaluate_corruptions(comparison, folder=folder)


def test_every_checkpoint_has_a_row_clean_under_each_change_their_mean_and_the_worst(compared) -> None:
    rows = compared[1].rows
    expected = [(checkpoint, change) for checkpoint in ("chosen on held-out", "last") for change in ORDER]
    assert [(row.result.checkpoint, row.change) for row in rows] == expected
    assert all(row.result.threshold == rows[0].result.threshold for row in rows[: len(ORDER)])


def test_the_row_clean_is_the_evaluation_of_the_images_as_they_are(compared) -> None:
    comparison, report = compared
    clean = [row.result for row in report.rows if row.change == CLEAN]
    assert clean == comparison.rows


def test_metrics_and_rates_are_those_of_the_changed_images_at_the_threshold_of_clean_ones(root: Path, compared) -> None:
    comparison, report = compared
    paths = [sample.image for sample in comparison.images.test]
    labels = np.array([sample.label for sample in comparison.images.test])
    model = MSFlow.load(root / "runs/a/last.safetensors")
    threshold = model.calibration.threshold().value
    rates = set()
    for row in report.rows[len(ORDER) :]:
        if row.change in LIGHT_CORRUPTIONS:
            absolute = scores_of(model, paths, row.change).absolute_score.numpy()
            found = row.result.evaluation
            assert found.image_auroc_absolute == auroc(labels, absolute), row.change
            assert found.false_alarm_rate == (absolute[labels == 0] > threshold).mean(), row.change
            assert found.recall == (absolute[labels == 1] > threshold).mean(), row.change
            assert found.aupro is not None
            rates.add(found.false_alarm_rate)
    assert len(rates) > 1, "no change moves the false-alarm rate, so this test tells nothing"


def test_mean_and_worst_are_of_the_changes_alone(compared) -> None:
    by_change = {row.change: row.result.evaluation for row in compared[1].rows[: len(ORDER)]}
    for metric in METRICS:
        values = [getattr(by_change[change], metric) for change in LIGHT_CORRUPTIONS]
        mean, worst = (getattr(by_change[name], metric) for name in (MEAN, WORST))
        if None in values:
            assert (mean, worst) == (None, None), metric
        else:
            assert mean == pytest.approx(np.mean(values)), metric
            assert worst == (max(values) if metric == "false_alarm_rate" else min(values)), metric


def test_the_worst_false_alarm_rate_and_pixel_error_are_the_highest() -> None:
    one = Evaluation(0.9, 0.8, 0.7, aupro=0.5, false_alarm_rate=0.1, recall=0.3, pixel_error=0.0)
    other = Evaluation(0.6, 0.9, 0.8, false_alarm_rate=0.4, recall=0.9, pixel_error=0.1)
    assert worst_evaluation([one, other]) == Evaluation(
        0.6, 0.8, 0.7, false_alarm_rate=0.4, recall=0.3, pixel_error=0.1
    )


def test_a_mean_over_classes_is_taken_for_each_change() -> None:
    rows = [
        CorruptionResult(change, CheckpointResult(name, "last", Evaluation(value, value, value)))
        for name, values in (("a", (1.0, 0.6)), ("b", (0.8, 0.2)))
        for change, value in zip((CLEAN, "darker"), values, strict=True)
    ]
    means = mean_over_classes(rows)
    assert [(row.change, row.result.name) for row in means] == [(CLEAN, MEAN), ("darker", MEAN)]
    assert [row.result.evaluation.image_auroc for row in means] == pytest.approx([0.9, 0.4])


def test_the_files_hold_every_metric_and_what_was_changed(compared, tmp_path: Path) -> None:
    rows = compared[1].rows
    write_corruption(tmp_path, rows)
    content = json.loads((tmp_path / "corruption.json").read_text())
    assert content["changes"] == {name: asdict(change) for name, change in LIGHT_CORRUPTIONS.items()}
    assert [row["change"] for row in content["rows"]] == ORDER * 2
    with (tmp_path / "corruption.csv").open() as file:
        table = list(csv.DictReader(file))
    assert list(table[0])[:3] == ["class", "checkpoint", "change"]
    assert set(METRICS) < set(table[0])
    assert [float(row["image_auroc"]) for row in table] == [row.result.evaluation.image_auroc for row in rows]


def test_pictures_show_the_median_good_and_defective_image_as_the_model_was_shown_them(root: Path, compared) -> None:
    comparison, report = compared
    paths = [sample.image for sample in comparison.images.test]
    absolute = comparison.test_result.scores.absolute_score
    assert [row.kind for row in report.pictures] == [
        f"{change}: {kind}" for change in (CLEAN, *LIGHT_CORRUPTIONS) for kind in ("good", "spot")
    ]
    model = MSFlow.load(root / "runs/a/best.safetensors")
    for row in report.pictures:
        number = paths.index(row.image)
        same_kind = sorted(
            a for a, path in zip(absolute.tolist(), paths, strict=True) if path.parent == row.image.parent
        )
        assert absolute[number] == same_kind[len(same_kind) // 2]
        change = row.kind.partition(":")[0]
        scores = scores_of(model, paths, change)
        np.testing.assert_allclose(row.score_map, scores.absolute_map[number].numpy(), **OPERATION_CLOSE)
        assert row.score == pytest.approx(scores.absolute_score[number].item(), rel=OPERATION_CLOSE["rtol"])
        light = LIGHT_CORRUPTIONS.get(change)
        pixels = load_image(row.image, SIZE)
        pixels = pixels if light is None else light.for_image(number)(pixels)
        assert (row.pixels == (pixels * 255).round().byte().permute(1, 2, 0).numpy()).all()
        assert (row.mask is not None) == (row.label == 1)


@pytest.fixture
def few_changes(monkeypatch) -> list[str]:
    """Takes two of the changes alone, to be quick, and returns the names of an evaluation's rows."""
    few = {name: LIGHT_CORRUPTIONS[name] for name in ("darker", "gradient")}
    monkeypatch.setattr(corruption, "LIGHT_CORRUPTIONS", few)
    return [CLEAN, *few, MEAN, WORST]


def test_images_in_tiles_are_changed_as_a_whole(root: Path, few_changes: list[str], tmp_path: Path) -> None:
    images, model = str(root / "images"), root / "runs/a/last.safetensors"
    with closing(ScoreMapStore(tmp_path)) as maps, warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        comparison = compare_checkpoints(model, images, "a", maps=maps, tiles=TileOptions(32, 0.25))
        report = evaluate_corruptions(comparison, folder=tmp_path)
    assert [row.change for row in report.rows] == few_changes
    assert len({row.result.evaluation.aupro for row in report.rows[:3]}) == 3
    assert {row.pixels.shape for row in report.pictures} == {(48, 40, 3)}
    number = [sample.image for sample in comparison.images.test].index(report.pictures[-1].image)
    whole = load_image(report.pictures[-1].image, (48, 40))
    changed = LIGHT_CORRUPTIONS["gradient"].for_image(number)(whole)
    assert (report.pictures[-1].pixels == (changed * 255).round().byte().permute(1, 2, 0).numpy()).all()
    assert {row.score_map.shape for row in report.pictures} == {(48, 40)}
    write_pictures(tmp_path / "corruptions.png", report.pictures, comparison.model)
    assert max(Image.open(tmp_path / "corruptions.png").size) > 4 * SIDE / 2


@pytest.mark.parametrize("width", [80, 100])
def test_a_terminal_shows_whole_words_and_values(compared, monkeypatch, capsys, *, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    # A command that ran in this process with --json has silenced it.
    monkeypatch.setattr(console, "quiet", False)
    print_corruption(compared[1].rows)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    assert "…" not in out
    for text in ("a, chosen on held-out", "a, last", *LIGHT_CORRUPTIONS, "(absolute)", "false-alarm", "recall", WORST):
        assert text in out
    false_alarms = compared[1].rows[1].result.evaluation.false_alarm_rate
    darker = next(line for line in out.splitlines() if "darker" in line)
    assert f"{false_alarms:.4f}" in darker


def test_the_command_ends_every_class_with_the_mean_and_adds_the_tables_to_the_report(
    root: Path, command, few_changes: list[str], tmp_path: Path
) -> None:
    arguments = (root / "runs", root / "images", "--class", "all", "--out", tmp_path)
    code, out = command("evaluate", *arguments, "--corrupt", "light", "--json")
    assert code == 0
    # Warnings follow the JSON.
    rows = json.JSONDecoder().raw_decode(out)[0]["corruption"]
    assert rows == json.loads((tmp_path / "corruption.json").read_text())["rows"]
    assert [row["change"] for row in rows] == few_changes * 6
    darker = {row["class"]: row["recall"] for row in rows if (row["checkpoint"], row["change"]) == ("last", "darker")}
    *classes, mean = darker.values()
    assert list(darker) == ["a", "b", "mean"]
    assert mean == pytest.approx(sum(classes) / 2)
    files = {"a", "b", "corruption.csv", "corruption.json", "metrics.csv", "metrics.json"}
    assert names_in(tmp_path) == files
    assert "corruptions.png" in names_in(tmp_path / "a")
    assert '"gradient"' in (tmp_path / "a/report.html").read_text()
    # Without the option, nothing of it remains beside the new results.
    assert command("evaluate", *arguments, "--quiet")[0] == 0
    assert names_in(tmp_path) == files - {"corruption.csv", "corruption.json"}
    assert "corruptions.png" not in names_in(tmp_path / "a")
