"""Masks that mark nothing or everything, or lose regions, are named, and what they leave undefined is no number."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmsflow.data import open_image_set
from fastmsflow.errors import InputWarning
from fastmsflow.evaluation import ground_truth
from fastmsflow.evaluation.evaluate import evaluate_all
from fastmsflow.evaluation.results import PIXEL_METRICS, Evaluation
from tests.helpers.tiny_model import tiny_model

SIDE = 64


def image_set(root: Path, *masks: np.ndarray) -> Path:
    """Writes 2 good test images and one defective image for each mask (128, 128)."""
    random = np.random.default_rng(0)
    for name in ("train/good", "test/good", "test/spot", "ground_truth/spot"):
        (root / name).mkdir(parents=True)
    names = ["train/good/0", "test/good/0", "test/good/1", *(f"test/spot/{i}" for i in range(len(masks)))]
    for name in names:
        Image.fromarray(random.integers(0, 256, (128, 128), np.uint8)).save(root / f"{name}.png")
    for i, mask in enumerate(masks):
        Image.fromarray(mask).save(root / f"ground_truth/spot/{i}_mask.png")
    return root


def evaluated(root: Path) -> tuple[Evaluation, object, list[str]]:
    model = tiny_model(image_size=(SIDE, SIDE)).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", InputWarning)
        (result,) = evaluate_all([model], open_image_set(root), dtype=None)
    return (
        result.evaluation,
        result.pro_curve(),
        [str(warning.message) for warning in caught if warning.category is InputWarning],
    )


def marked(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros((128, 128), np.uint8)
    for top, left, bottom, right in boxes:
        mask[top:bottom, left:right] = 255
    return mask


@pytest.fixture(params=["exact", "histograms"], autouse=True)
def way(request, monkeypatch) -> str:
    if request.param == "histograms":
        monkeypatch.setattr(ground_truth, "EXACT_PIXELS", 0)
    return request.param


def test_masks_that_mark_no_pixel_leave_pixel_metrics_undefined(tmp_path: Path) -> None:
    evaluation, curve, (line,) = evaluated(image_set(tmp_path, marked(), marked()))
    assert line.startswith("2 masks mark no pixel: ")
    assert re.search(r"spot/0_mask\.png; .*spot/1_mask\.png; draw the defects, or move", line)
    assert curve is None
    assert {name: getattr(evaluation, name) for name in PIXEL_METRICS} == dict.fromkeys(PIXEL_METRICS)
    shown = evaluation.as_shown()
    assert all(name in shown for name in PIXEL_METRICS)
    assert 0 <= evaluation.image_auroc <= 1


def test_one_mask_of_several_that_marks_no_pixel_is_named_and_the_others_count(tmp_path: Path) -> None:
    evaluation, curve, (line,) = evaluated(image_set(tmp_path, marked(), marked((20, 20, 60, 60))))
    assert re.match(r"1 mask marks no pixel: .*spot/0_mask\.png; draw", line)
    assert evaluation.pixel_auroc is not None
    assert curve is not None


def test_masks_that_mark_every_pixel_are_named(tmp_path: Path) -> None:
    evaluation, _, (line,) = evaluated(image_set(tmp_path, marked((0, 0, 128, 128))))
    assert re.match(r"1 mask marks every pixel: .*spot/0_mask\.png; if that is not meant", line)
    assert evaluation.pixel_auroc is not None


def test_regions_that_resizing_loses_are_counted(tmp_path: Path) -> None:
    lost = [(y, 0, y + 1, 1) for y in range(0, 120, 4)]
    evaluation, _, (line,) = evaluated(image_set(tmp_path, marked(*lost, (60, 60, 90, 90)), marked((0, 0, 9, 9))))
    assert re.match(r"30 regions of 1 mask are too small to have a pixel at 64x64: 30 of .*spot/0_mask\.png; ", line)
    assert evaluation.aupro is not None


def test_masks_that_resizing_empties_leave_pixel_metrics_undefined(tmp_path: Path) -> None:
    evaluation, curve, (line,) = evaluated(image_set(tmp_path, marked((0, 0, 1, 1))))
    assert line.startswith("1 region of 1 mask is too small to have a pixel at 64x64: ")
    assert (evaluation.aupro, evaluation.aupro_published, curve) == (None, None, None)


def test_ordinary_masks_are_not_told_of(tmp_path: Path) -> None:
    evaluation, curve, lines = evaluated(image_set(tmp_path, marked((20, 20, 60, 60))))
    assert lines == []
    assert None not in [getattr(evaluation, name) for name in PIXEL_METRICS if name != "aupro_published"]
    assert curve is not None
