"""Evaluation of images in tiles, whose maps and masks have each image's own size."""

import copy
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmsflow import InputError, MSFlow
from fastmsflow.data import ImageSet, mvtec
from fastmsflow.errors import InputWarning
from fastmsflow.evaluation.calibrate_model import calibrate_on_files
from fastmsflow.evaluation.compare_checkpoints import compare_checkpoints
from fastmsflow.evaluation.evaluate import evaluate, evaluate_all
from fastmsflow.evaluation.ground_truth import GroundTruth
from fastmsflow.evaluation.report import GALLERY, PAGE, PART, TABLE, write_test_report
from fastmsflow.evaluation.score_map_store import ScoreMapStore
from fastmsflow.inference import TiledPredictor
from fastmsflow.inference.tiled_models import TileOptions
from fastmsflow.metrics import auroc, f1_max
from fastmsflow.tiling import Tiling
from tests.helpers.tiny_model import tiny_model

SIZES = [(40, 70), (33, 95), (64, 50), (90, 90)]
DEFECT = np.s_[10:18, 20:30]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """Images of noise of four sizes, good and, with a gray patch, defective."""
    root, random = tmp_path_factory.mktemp("set"), np.random.default_rng(1)
    for kind in ("train/good", "test/good", "test/bad"):
        (root / "a" / kind).mkdir(parents=True)
        for number, size in enumerate(SIZES):
            pixels = random.integers(0, 256, (*size, 3), np.uint8)
            if kind == "test/bad":
                pixels[DEFECT] = 128
            Image.fromarray(pixels).save(root / "a" / kind / f"{number}.png")
    (root / "a/ground_truth/bad").mkdir(parents=True)
    for number, size in enumerate(SIZES):
        mask = np.zeros(size, np.uint8)
        mask[DEFECT] = 255
        Image.fromarray(mask).save(root / "a/ground_truth/bad" / f"{number}_mask.png")
    return mvtec(root, "a")


@pytest.fixture(scope="module")
def model() -> MSFlow:
    made = tiny_model().eval()
    made.tiling = Tiling(32, top_share=0.05)
    return made


@pytest.mark.parametrize("workers", [0, 1])
def test_metrics_are_those_of_maps_at_the_images_own_size(images: ImageSet, model: MSFlow, *, workers: int) -> None:
    evaluation, scores = evaluate(model, images, workers=workers, dtype=None)
    predictor = TiledPredictor(model, 32)
    given = [torch.from_numpy(np.array(Image.open(sample.image))).permute(2, 0, 1) for sample in images.test]
    expected = list(predictor.scores(given))
    torch.testing.assert_close(scores.absolute_score, torch.cat([each.absolute_score for each in expected]))
    labels = np.array([sample.label for sample in images.test])
    assert evaluation.image_auroc_absolute == auroc(labels, scores.absolute_score)
    truth = GroundTruth.from_image_set(images, None)
    masks = np.concatenate([truth.load_masks([number]).ravel() for number in range(len(labels))])
    absolute = torch.cat([each.absolute_map.flatten() for each in expected])
    additive = torch.cat([each.score_map_add.flatten() for each in expected])
    assert evaluation.pixel_error is not None
    assert evaluation.pixel_error < 1e-3
    assert evaluation.pixel_auroc_absolute == pytest.approx(auroc(masks, absolute), abs=evaluation.pixel_error + 1e-6)
    assert evaluation.pixel_f1 == pytest.approx(f1_max(masks, additive), abs=evaluation.pixel_error + 1e-6)
    assert masks.sum() == 4 * 80


def test_a_mask_of_another_size_is_one_line(images: ImageSet, model: MSFlow, tmp_path: Path) -> None:
    mask = next(sample.mask for sample in images.test if sample.mask is not None)
    content = mask.read_bytes()
    try:
        Image.new("L", (10, 10), 255).save(mask)
        with pytest.raises(
            InputError, match=r"the mask is 10x10, its image .* \d+x\d+; give a mask of the image's size$"
        ):
            evaluate(model, images)
    finally:
        mask.write_bytes(content)


def test_a_report_shows_images_at_their_own_size(images: ImageSet, model: MSFlow, tmp_path: Path) -> None:
    with closing(ScoreMapStore(tmp_path)) as maps:
        (result,) = evaluate_all([model], images, maps=maps)
        assert result.maps is not None
        assert [result.maps[number].shape for number in range(8)] == 2 * SIZES
        write_test_report(tmp_path, images, model, result, metrics={"last": {}}, settings={})
    assert sorted(path.name for path in tmp_path.glob("*.*")) == sorted([TABLE, PAGE, GALLERY, "scores.png"])
    with Image.open(tmp_path / GALLERY) as gallery:
        assert min(gallery.size) > PART


def test_checkpoints_of_a_run_are_told_once_that_thresholds_are_of_other_tiles(
    images: ImageSet, model: MSFlow, tmp_path: Path
) -> None:
    calibrated = copy.deepcopy(model)
    calibrated.calibration = calibrate_on_files(model, [sample.image for sample in images.test], false_alarms=0.4)
    for name in ("best", "last"):
        calibrated.save(tmp_path / f"{name}.safetensors")
    root = images.test[0].image.parents[3]
    with pytest.warns(InputWarning) as told, closing(ScoreMapStore(tmp_path)) as maps:
        compare_checkpoints(tmp_path, str(root), "a", maps=maps, tiles=TileOptions(overlap=0.5))
    assert sum("thresholds are of" in str(warning.message) for warning in told) == 1
