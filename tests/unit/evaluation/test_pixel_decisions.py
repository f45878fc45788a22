"""Decisions on pixels at the label-free threshold: SegF1 and the rates of false pixels."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from fastmsflow.calibration import Calibration
from fastmsflow.data import Sample
from fastmsflow.distributed.process_group import SINGLE_PROCESS
from fastmsflow.evaluation.evaluator import Evaluator
from fastmsflow.evaluation.ground_truth import GroundTruth
from fastmsflow.evaluation.metric_labels import labeled
from fastmsflow.evaluation.pixel_decisions import PixelDecisions
from fastmsflow.evaluation.report import pixel_note
from fastmsflow.evaluation.results import Evaluation
from fastmsflow.metrics import f1_max
from fastmsflow.pixel_calibration import PixelThresholds
from fastmsflow.scoring import Scores, score_log_likelihoods

SIDE, THRESHOLD = 32, 2.0
LABELS = np.array([0, 0, 0, 1, 1])
CALIBRATION = Calibration((1.0,) * 30, (1.0,) * 30, 0.5, pixels=PixelThresholds((0.001,), (THRESHOLD,), (0.0,), (0.1,)))


@pytest.fixture
def masks() -> np.ndarray:
    masks = np.zeros((len(LABELS), SIDE, SIDE), bool)
    masks[3, 2:9, 3:20] = masks[4, 20:30, 20:30] = True
    return masks


@pytest.fixture
def scores(masks: np.ndarray) -> Scores:
    """Scores of one level, in quarters of a nat, so that many pixels are at the threshold itself."""
    nats = np.random.default_rng(0).exponential(0.5, masks.shape) + masks
    return score_log_likelihoods([-torch.from_numpy((nats * 4).round() / 4).float()], (SIDE, SIDE))


def evaluated(scores: Scores, masks: np.ndarray | None, calibration: Calibration | None, *, exact: bool) -> Evaluation:
    samples = [Sample(Path("image.png"), int(label)) for label in LABELS]
    known = GroundTruth(samples, LABELS, (SIDE, SIDE), masks is not None, exact, masks)
    evaluator = Evaluator(known, 1, calibration=calibration)
    evaluator.add(range(len(LABELS)), scores, masks)
    evaluator.complete()
    return evaluator.result().evaluation


@pytest.mark.parametrize("exact", [True, False], ids=["maps in memory", "histograms"])
def test_seg_f1_at_the_label_free_threshold_is_exact_and_apart_from_the_best_one(
    exact: bool, scores: Scores, masks: np.ndarray
) -> None:
    found = evaluated(scores, masks, CALIBRATION, exact=exact)
    absolute = scores.absolute_map.numpy()
    above = absolute > THRESHOLD
    assert found.seg_f1 == pytest.approx(f1_score(masks.ravel(), above.ravel()), abs=1e-12)
    assert found.seg_f1_max == pytest.approx(f1_max(masks, absolute), abs=1e-12)
    assert found.seg_f1 < found.seg_f1_max
    assert found.pixel_fpr == above[~masks].mean()
    assert found.false_pixel_rate == pytest.approx(above[LABELS == 0].mean(), abs=1e-12)


def test_a_good_image_counts_the_same_whatever_its_size() -> None:
    decisions = PixelDecisions(0.5, np.array([0, 0]), SINGLE_PROCESS)
    decisions.add([0], np.ones((1, 2, 2), np.float32), None)
    decisions.add([1], np.zeros((1, 90, 90), np.float32), None)
    assert decisions.compute() == {"false_pixel_rate": 0.5}


def test_without_masks_the_false_pixels_of_good_images_are_counted_alone(scores: Scores) -> None:
    found = evaluated(scores, None, CALIBRATION, exact=True)
    assert found.false_pixel_rate is not None and found.false_pixel_rate > 0
    assert found.seg_f1 is None and found.pixel_fpr is None


def test_without_a_threshold_of_pixels_there_are_no_decisions_on_them(scores: Scores, masks: np.ndarray) -> None:
    for calibration in (None, replace(CALIBRATION, pixels=None)):
        shown = evaluated(scores, masks, calibration, exact=True).as_shown()
        assert not {"seg_f1", "pixel_fpr", "false_pixel_rate"} & set(shown)
        assert {"seg_f1_max", "aupro_05", "aupro_absolute", "aupro_absolute_05"} <= set(shown)


def test_a_metric_that_an_earlier_version_did_not_compute_is_not_shown_as_undefined() -> None:
    old = {"image_auroc": 1.0, "image_auroc_log": 1.0, "image_auroc_absolute": 1.0, "pixel_auroc": 0.9}
    shown = Evaluation.from_dict({**old, "aupro": 0.8, "pixel_error": 0.0}).as_shown()
    assert shown == {**old, "aupro": 0.8, "aupro_published": None}


def test_the_report_speaks_of_seg_f1_only_where_it_shows_it(scores: Scores, masks: np.ndarray) -> None:
    with_masks, without = (
        pixel_note(CALIBRATION, {"last": labeled(evaluated(scores, some, CALIBRATION, exact=True).as_shown())})
        for some in (masks, None)
    )
    assert without == f"Pixel threshold: {CALIBRATION.pixel_threshold()}; no defect was needed for it."
    assert with_masks.startswith(f"{without} SegF1 (pixel threshold) is judged at it. SegF1-max (chosen on test) is")
    assert pixel_note(None, {}) == ""
