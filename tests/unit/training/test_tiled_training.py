"""Training on tiles: however features come, whole images are scored, and runs are resumed to the bit."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastmsflow import InputError, MSFlow
from fastmsflow.data import ImageSet, ShardSet, folder, load_image, write_shards
from fastmsflow.evaluation.evaluate import evaluate
from fastmsflow.inference import TiledPredictor
from fastmsflow.recipe import DataConfig, Recipe
from fastmsflow.tiling import Tiling
from fastmsflow.training import TrainingResult, checkpointing, train
from fastmsflow.training.lightning_module import MSFlowLightningModule
from fastmsflow.training.loss_monitor import NotFinite
from fastmsflow.training.memory_check import _feature_bytes
from tests.helpers.tiny_model import tiny_model
from tests.helpers.tolerances import KEPT_TILES

RECIPE = Recipe(lr=1e-3, batch_size=8, meta_epochs=2, sub_epochs=1, warm_up=0, hold_out=0.25)
SIZES = ((48, 80), (40, 36))
TILING = Tiling(32, position="image")
WAYS = ("kept", "cached", "streamed")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageSet:
    """8 training images of two sizes, and 2 good and 2 defective test images with masks."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(5)
    for kind, count in (("train", 8), ("test/good", 2), ("test/bad", 2), ("masks/bad", 2)):
        (root / kind).mkdir(parents=True)
        for i in range(count):
            height, width = SIZES[i % 2]
            pixels = random.integers(0, 256, (height, width, 3), np.uint8)
            if kind == "masks/bad":
                pixels = np.zeros((height, width), np.uint8)
                pixels[5:20, 8:30] = 255
            Image.fromarray(pixels).save(root / kind / f"{i}.png")
    return folder(root / "train", root / "test", root / "masks")


def run(images: ImageSet, out: Path, way: str = "kept", **options) -> TrainingResult:
    tiling, resume = options.pop("tiling", TILING), options.pop("resume", False)
    model = tiny_model()
    model.tiling = tiling
    cache = {"feature_cache": out.parent / "cache", "cache_dtype": "float32"} if way == "cached" else {}
    reading = DataConfig(stream=way == "streamed", **cache, **options)
    return train(model, images, RECIPE, out, reading=reading, resume=resume)


@pytest.fixture(scope="module", params=WAYS)
def trained(request, images: ImageSet, tmp_path_factory) -> tuple[str, TrainingResult, Path]:
    out = tmp_path_factory.mktemp("run") / "run"
    return request.param, run(images, out, request.param), out


@pytest.fixture(scope="module")
def kept(images: ImageSet, tmp_path_factory) -> TrainingResult:
    return run(images, tmp_path_factory.mktemp("kept") / "run")


def test_tiles_kept_cached_and_streamed_give_the_same_losses(trained, kept: TrainingResult) -> None:
    _, result, _ = trained
    assert result.losses == pytest.approx(kept.losses, **KEPT_TILES)
    for ours, expected in zip(result.epoch_results, kept.epoch_results, strict=True):
        assert ours.held_out_nll == pytest.approx(expected.held_out_nll, **KEPT_TILES)


def test_held_out_and_test_images_are_scored_whole_as_the_saved_model_scores_them(trained, images: ImageSet) -> None:
    """At their own size, by blended maps: scores, metrics and the calibration."""
    _, result, out = trained
    model = MSFlow.load(out / "last.safetensors")
    assert model.tiling == TILING
    assert len(model.calibration.scores) == 2
    evaluation, scores = evaluate(model, images)
    assert result.test_result.scores.absolute_score.tolist() == pytest.approx(
        scores.absolute_score.tolist(), **KEPT_TILES
    )
    ours, theirs = (
        {name: value for name, value in of.as_dict().items() if value is not None and name != "pixel_error"}
        for of in (result.last, evaluation)
    )
    assert "pixel_auroc" in ours and ours == pytest.approx(theirs, **KEPT_TILES)
    predictor = TiledPredictor(model, TILING.tile)
    for number, sample in enumerate(images.test):
        with Image.open(sample.image) as image:
            size = image.height, image.width
        prediction = predictor.predict(load_image(sample.image, size)[None])
        expected = prediction.absolute_score.item()
        assert result.test_result.scores.absolute_score[number].item() == pytest.approx(expected, **KEPT_TILES)
        assert result.test_result.maps[number].shape == size


class Interrupted(Exception):
    """Takes the place of a machine that fails."""


VARIED = {"augment": "light", "tile_jitter": 6}


@pytest.mark.parametrize("way", ["kept", "streamed"])
def test_a_run_of_moved_and_lit_tiles_is_resumed_to_the_bit(way: str, images, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checkpointing, "SAVE_SECONDS", 0.0)
    expected = run(images, tmp_path / "whole", way, **VARIED)
    step = MSFlowLightningModule.training_step

    def failing(self, batch, batch_index):
        if self.current_epoch == 1 and batch_index == 2:
            raise Interrupted
        return step(self, batch, batch_index)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(MSFlowLightningModule, "training_step", failing)
        run(images, tmp_path / "run", way, **VARIED)
    with pytest.raises(InputError, match="tile_jitter was 6, is 5"):
        run(images, tmp_path / "run", way, **VARIED | {"tile_jitter": 5}, resume=True)
    result = run(images, tmp_path / "run", way, **VARIED, resume=True)
    assert result.losses == expected.losses
    assert [r.as_row() for r in result.epoch_results] == [r.as_row() for r in expected.epoch_results]
    ours, theirs = (load_file(tmp_path / name / "last.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_light_and_places_change_the_training_images_alone(images: ImageSet, kept: TrainingResult, tmp_path) -> None:
    """With a learning rate that changes nothing, the scores of held-out and test images stay as they are."""
    still = Recipe(lr=1e-30, batch_size=64, meta_epochs=1, sub_epochs=2, warm_up=0, hold_out=0.25)
    results = []
    for name, options in (("plain", {}), ("varied", VARIED), ("streamed", {**VARIED, "stream": True})):
        model = tiny_model()
        model.tiling = TILING
        results.append(train(model, images, still, tmp_path / name, reading=DataConfig(**options)))
    plain, varied, streamed = results
    for result in (varied, streamed):
        assert result.losses != plain.losses
        assert result.epoch_results[0].held_out_nll == pytest.approx(plain.epoch_results[0].held_out_nll, **KEPT_TILES)
        assert result.test_result.scores.score.tolist() == pytest.approx(
            plain.test_result.scores.score.tolist(), **KEPT_TILES
        )
    # Each pass has other views.
    assert plain.losses[0] == pytest.approx(plain.losses[1], **KEPT_TILES)
    for result in (varied, streamed):
        assert result.losses[0] != pytest.approx(result.losses[1], **KEPT_TILES)


def test_a_loss_that_is_not_finite_names_the_tiles(images: ImageSet, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(globals(), "RECIPE", Recipe(lr=1e30, batch_size=2, meta_epochs=1, warm_up=0))
    with pytest.raises(NotFinite, match=r"of the images \S+/\d\.png \(tile at \d+, \d+\), \S+/\d\.png \(tile at"):
        run(images, tmp_path / "run")


def test_whole_images_are_trained_in_varied_light(images: ImageSet, tmp_path: Path) -> None:
    cached = {"augment": "light", "augment_variants": 3, "feature_cache": tmp_path / "cache", "cache_dtype": "float32"}
    losses = [
        run(images, tmp_path / name, tiling=None, **options).losses
        for name, options in (("plain", {}), ("kept", {"augment": "light", "augment_variants": 3}))
    ]
    model = tiny_model()
    losses.append(train(model, images, RECIPE, tmp_path / "cached", reading=DataConfig(**cached)).losses)
    assert losses[0] != pytest.approx(losses[1], **KEPT_TILES)
    assert losses[1] == pytest.approx(losses[2], **KEPT_TILES)


def test_images_of_shards_are_trained_in_varied_light(images: ImageSet, tmp_path: Path) -> None:
    write_shards([sample.image for sample in images.train], tmp_path / "shards", images_per_shard=2)
    shards = ShardSet.from_source(str(tmp_path / "shards"))
    recipe = Recipe(lr=1e-30, batch_size=8, meta_epochs=1, sub_epochs=2, warm_up=0)
    plain, *lit = (
        train(tiny_model(), shards, recipe, tmp_path / name, reading=DataConfig(augment=augment)).losses
        for name, augment in (("plain", None), ("light", "light"), ("again", "light"))
    )
    assert plain[0] == pytest.approx(plain[1], **KEPT_TILES)
    assert lit[0] == lit[1]
    assert len({round(loss) for loss in (plain[0], *lit[0])}) == 3


@pytest.mark.parametrize("options", [{}, {"pool": "none"}, {"image_size": (52, 75)}], ids=str)
def test_the_size_of_features_that_is_compared_with_the_memory_is_theirs(options: dict) -> None:
    model = tiny_model(**options)
    features = model.pooled(torch.zeros(1, 3, *model.image_size))
    assert _feature_bytes(model.extractor, model) == sum(level.nbytes for level in features)


def test_a_cache_of_other_tiles_is_refused_by_the_place_of_one(images: ImageSet, tmp_path: Path) -> None:
    run(images, tmp_path / "run", "cached")
    with pytest.raises(
        InputError, match=r"a feature cache of other tiles: \d+ of \d+ are .*0\.png \(tile at 16, 0\); re"
    ):
        run(images, tmp_path / "other", "cached", tiling=Tiling(32, 0.5))


def test_tiles_of_shards_and_more_features_than_memory_are_refused_before_anything_is_written(
    images: ImageSet, monkeypatch, tmp_path: Path
) -> None:
    write_shards([sample.image for sample in images.train], tmp_path / "shards", images_per_shard=2)
    with pytest.raises(InputError, match="shards are not cut into tiles; train from the files that they were made of"):
        run(ShardSet.from_source(str(tmp_path / "shards")), tmp_path / "run")
    with pytest.raises(InputError, match="this model takes whole images; leave it out"):
        run(images, tmp_path / "run", tiling=None, tile_jitter=2)
    monkeypatch.setattr("fastmsflow.training.memory_check.available_memory", lambda: 2**20)
    with pytest.raises(
        InputError,
        match=r"^the features of \d+ tiles take [\d.]+ MiB of memory, and 1\.0 MiB are free; give --feature-cache DIR "
        "or --stream or a smaller --overlap or --scale or fewer --augment-variants$",
    ):
        run(images, tmp_path / "run", **VARIED, augment_variants=60)
    assert not (tmp_path / "run").exists()


def test_a_mask_of_another_size_is_told_before_anything_is_computed(images: ImageSet, monkeypatch, tmp_path) -> None:
    """Masks of images in tiles are read after the first round."""
    defective = next(sample for sample in images.test if sample.mask is not None)
    Image.new("L", (20, 30)).save(tmp_path / "other.png")
    other = replace(images, test=(*images.test, replace(defective, mask=tmp_path / "other.png")))
    monkeypatch.setattr(MSFlow, "pooled", None)
    with pytest.raises(InputError, match=r"other\.png: the mask is 20x30, its image 0\.png 80x48; give a mask of the"):
        run(other, tmp_path / "run", "streamed")
    assert not (tmp_path / "run").exists()
