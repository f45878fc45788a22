"""Each kind of defect is judged apart, against the same good images, where a set asks for it."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastmsflow import MSFlow
from fastmsflow.data import ImageSet, open_image_set
from fastmsflow.evaluation import ground_truth
from fastmsflow.evaluation.calibrate_model import calibrate_on_files
from fastmsflow.evaluation.compare_checkpoints import MEAN, CheckpointResult, as_dicts, mean_of
from fastmsflow.evaluation.evaluate import evaluate_all
from fastmsflow.evaluation.evaluator import TestResult
from fastmsflow.evaluation.ground_truth import GroundTruth
from fastmsflow.evaluation.kinds import MEAN_OF_KINDS
from fastmsflow.evaluation.results import METRICS, PIXEL_METRICS, Evaluation
from fastmsflow.metrics import auroc
from fastmsflow.tiling import Tiling
from tests.helpers.mvtec_loco_tree import VALUES, write_mvtec_loco
from tests.helpers.tiny_model import tiny_model
from tests.helpers.tolerances import BINNED_MAPS

SIZE = (32, 48)


@pytest.fixture(scope="module")
def loco(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("loco")
    for name in ("pushpins", "screw_bag"):
        write_mvtec_loco(root / name, size=SIZE)
    return root


@pytest.fixture(scope="module")
def images(loco: Path) -> ImageSet:
    return open_image_set(loco, "pushpins")


@pytest.fixture(scope="module")
def model(images: ImageSet) -> MSFlow:
    model = tiny_model(image_size=SIZE)
    files = [sample.image for sample in (*images.train, *images.validation)]
    model.calibration = calibrate_on_files(model, files, false_alarms=0.3)
    return model


def evaluated(model: MSFlow, images: ImageSet, by_kind: bool = True) -> TestResult:
    (result,) = evaluate_all([model], images, dtype=None, by_kind=by_kind)
    return result


def of_kind(images: ImageSet, kind: str) -> ImageSet:
    return replace(images, test=tuple(sample for sample in images.test if sample.kind in ("good", kind)))


def test_a_kind_is_judged_as_a_set_of_its_images_and_the_good_ones(model: MSFlow, images: ImageSet) -> None:
    result = evaluated(model, images)
    assert list(result.kinds) == [*VALUES, MEAN_OF_KINDS]
    for kind in VALUES:
        alone = evaluated(model, of_kind(images, kind), by_kind=False).evaluation
        assert alone.seg_f1 is not None and alone.f1 is not None and alone.aupro is not None
        assert result.kinds[kind] == alone
    assert result.evaluation == evaluated(model, images, by_kind=False).evaluation


def test_figures_of_a_kind_are_those_of_its_scores_and_the_mean_is_theirs(model: MSFlow, images: ImageSet) -> None:
    result = evaluated(model, images)
    scores = result.scores.absolute_score.numpy()
    by_hand = []
    for kind in VALUES:
        rows = np.array([sample.kind in ("good", kind) for sample in images.test])
        labels = np.array([sample.label for sample in images.test])
        by_hand.append(auroc(labels[rows], scores[rows]))
        assert result.kinds[kind].image_auroc_absolute == by_hand[-1]
    assert by_hand[0] != by_hand[1]
    mean = result.kinds[MEAN_OF_KINDS]
    assert mean.image_auroc_absolute == pytest.approx(np.mean(by_hand))
    for name in METRICS:
        values = [getattr(result.kinds[kind], name) for kind in VALUES]
        assert None in values or getattr(mean, name) == pytest.approx(np.mean(values)), name


@pytest.mark.parametrize("tiled", [False, True], ids=["whole images", "tiles"])
def test_kinds_from_histograms_are_within_their_bound(
    tiled: bool, model: MSFlow, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tiled:
        model = tiny_model()
        model.tiling = Tiling(32)
        exact = {kind: evaluated(model, of_kind(images, kind), by_kind=False).evaluation for kind in VALUES}
    else:
        exact = dict(evaluated(model, images).kinds)
        monkeypatch.setattr(ground_truth, "EXACT_PIXELS", 0)
    found = evaluated(model, images).kinds
    for kind in VALUES:
        error = found[kind].pixel_error
        assert error is not None and error > 0
        for name in PIXEL_METRICS:
            if name != "aupro_published":  # too few thresholds may be left of so few pixels
                one, other = getattr(exact[kind], name), getattr(found[kind], name)
                assert abs(one - other) <= error + (exact[kind].pixel_error or 0) + BINNED_MAPS, name
        assert found[kind].image_auroc == exact[kind].image_auroc


def test_maps_that_are_held_once_more_for_a_kind_count_for_the_limit_of_memory(
    images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = 9 + 2 * (3 + 3)
    monkeypatch.setattr(ground_truth, "EXACT_PIXELS", held * SIZE[0] * SIZE[1])
    assert GroundTruth.from_image_set(images, SIZE).exact
    monkeypatch.setattr(ground_truth, "EXACT_PIXELS", held * SIZE[0] * SIZE[1] - 1)
    assert not GroundTruth.from_image_set(images, SIZE).exact
    assert GroundTruth.from_image_set(replace(images, kinds_apart=False), SIZE).exact


def test_means_over_classes_are_of_one_kind_each_and_columns_name_it() -> None:
    kinds = ((None, 0.5), ("logical_anomalies", 0.6), (MEAN_OF_KINDS, 0.7))
    rows = [
        CheckpointResult(name, "last", Evaluation(value + more, 0.0, 0.0), kind=kind)
        for name, more in (("a", 0.0), ("b", 0.2))
        for kind, value in kinds
    ]
    rows.append(CheckpointResult("b", "last", Evaluation(1.0, 1.0, 1.0), kind="structural_anomalies"))
    means = mean_of(rows)
    assert [(row.name, row.kind) for row in means] == [(MEAN, kind) for kind, _ in kinds]
    assert [row.evaluation.image_auroc for row in means] == pytest.approx([0.6, 0.7, 0.8])
    assert [row["kind"] for row in as_dicts(means)] == [kind for kind, _ in kinds]
    assert "kind" not in as_dicts(means[:1])[0]


def test_the_command_writes_a_row_and_a_table_of_each_kind(model: MSFlow, loco: Path, tmp_path: Path, command) -> None:
    for name in ("pushpins", "screw_bag"):
        (tmp_path / name).mkdir()
        model.save(tmp_path / name / "last.safetensors")
    code, text = command("evaluate", tmp_path, loco, "--class", "all", "--out", tmp_path / "out")
    assert code == 0, text
    titles = [f"{name}{kind}" for name in ("pushpins", "screw_bag", MEAN) for kind in ("", *_after_comma())]
    assert [line.split("┃")[1].strip() for line in text.splitlines() if line.startswith("┃")] == titles
    with (tmp_path / "out/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    kinds = ["", *VALUES, MEAN_OF_KINDS]
    assert [(row["class"], row["kind"]) for row in rows] == [
        (name, kind) for name in ("pushpins", "screw_bag", MEAN) for kind in kinds
    ]
    content = json.loads((tmp_path / "out/metrics.json").read_text())
    assert [row["kind"] for row in content[:4]] == [None, *VALUES, MEAN_OF_KINDS]
    assert all(row["aupro"] is not None and row["seg_f1"] is not None for row in content)
    page = (tmp_path / "out/pushpins/report.html").read_text()
    assert '"kinds":{"last":{"logical_anomalies":{"image AUROC":' in page


def _after_comma() -> list[str]:
    return [f", {kind}" for kind in (*VALUES, MEAN_OF_KINDS)]
