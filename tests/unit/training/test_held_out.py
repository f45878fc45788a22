"""Validation images of a set's own take the place of images held out of training."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastmsflow import InputError, MSFlow
from fastmsflow.data import ImageSet, Sample, fingerprint, mvtec_ad_2
from fastmsflow.data.fingerprint import names_fingerprint
from fastmsflow.data.reader_pool import ReaderPool
from fastmsflow.distributed.process_group import SINGLE_PROCESS
from fastmsflow.evaluation.calibrate_model import calibrate_on_files
from fastmsflow.models.checkpoint import read_config
from fastmsflow.recipe import DataConfig
from fastmsflow.tiling import Tiling
from fastmsflow.training import Recipe, train
from fastmsflow.training.datamodule import HELD_OUT, TRAIN, FileTrainingData
from fastmsflow.training.held_out import split
from fastmsflow.training.training_job import TrainingJob
from fastmsflow.training.training_plan import plan_training
from fastmsflow.training.training_result import TrainingResult
from tests.helpers.mvtec_ad_2_tree import write_mvtec_ad_2
from tests.helpers.noise_images import noise_set
from tests.helpers.tiny_model import tiny_model

RECIPE = Recipe(batch_size=2, meta_epochs=2, sub_epochs=1, lr=1e-3, false_alarms=0.4)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_mvtec_ad_2(tmp_path / "ad2", objects=("can", "rice"))


@pytest.fixture
def images(tree: Path) -> ImageSet:
    return mvtec_ad_2(tree, "can")


def trained(images: ImageSet, out: Path, **options) -> tuple[MSFlow, TrainingResult]:
    model = tiny_model()
    torch.manual_seed(0)
    return model, train(model, images, RECIPE, out, **options)


@pytest.mark.parametrize("stream", [False, True], ids=["features in memory", "streamed"])
@pytest.mark.parametrize("tiling", [None, Tiling(32)], ids=["whole images", "tiles"])
def test_all_of_train_is_trained_on_and_exactly_validation_is_held_out(
    stream: bool, tiling: Tiling | None, images: ImageSet
) -> None:
    model = tiny_model()
    model.tiling = tiling
    plan = plan_training(model, images, RECIPE, DataConfig(stream=stream), readers=ReaderPool(0), world=SINGLE_PROCESS)
    assert isinstance(plan.source, FileTrainingData)
    for name, samples in ((TRAIN, images.train), (HELD_OUT, images.validation)):
        dataset = plan.source.images[name]
        names = dict.fromkeys(dataset.name(item) for item in range(len(dataset)))
        assert list(names) == [str(sample.image) for sample in samples]
    assert list(plan.names[HELD_OUT]) == [str(sample.image) for sample in images.validation]
    assert plan.counts == {"train": 4, "held_out": 2, "validation": 2, "test": 4}


def test_validation_images_set_the_threshold_and_teach_nothing(tree: Path, tmp_path: Path) -> None:
    images = mvtec_ad_2(tree, "can")
    model, result = trained(images, tmp_path / "first")
    files = [sample.image for sample in images.validation]
    expected = calibrate_on_files(model, files, false_alarms=RECIPE.false_alarms)
    assert model.calibration is not None
    assert list(model.calibration.scores) == pytest.approx(list(expected.scores))

    other = tree / "rice/validation/good"
    shutil.rmtree(tree / "can/validation/good")
    shutil.copytree(other, tree / "can/validation/good")
    again, result_again = trained(mvtec_ad_2(tree, "can"), tmp_path / "second")
    assert result_again.losses == result.losses
    assert again.calibration is not None and again.calibration.scores != model.calibration.scores
    for value, value_again in zip(model.flow.parameters(), again.flow.parameters(), strict=True):
        assert torch.equal(value, value_again)


def test_the_record_of_a_run_names_its_validation_images(images: ImageSet, tmp_path: Path) -> None:
    _, result = trained(images, tmp_path)
    counts = json.loads((tmp_path / "results.json").read_text())["images"]
    assert [counts[key] for key in ("train", "held_out", "validation", "test")] == [4, 2, 2, 4]
    notes = read_config(tmp_path / "best.safetensors")["notes"]
    assert notes["chosen_by"] == "lowest nll of 2 validation images"
    assert result.held_out is not None and notes["epoch"] == result.held_out.epoch


def test_sets_without_validation_images_are_identified_as_by_earlier_versions(tmp_path: Path) -> None:
    for name in "abcm":
        (tmp_path / name).write_bytes(name.encode() * 3)
    good, bad = Sample(tmp_path / "b", 0), Sample(tmp_path / "c", 1, tmp_path / "m", "bad")
    images = ImageSet("x", (Sample(tmp_path / "a", 0),), (good, bad))
    before = "cc52615dabc60230", "6f940c487e69af9e"
    assert (fingerprint(images), names_fingerprint(images)) == before
    own = replace(images, validation=(good,))
    assert fingerprint(own) != before[0] and names_fingerprint(own) != before[1]
    assert fingerprint(own) != fingerprint(replace(own, validation=(replace(good, image=tmp_path / "a"),)))


def test_nothing_is_held_out_of_a_set_with_validation_images(images: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"can: has 2 validation images of its own, .*; leave hold_out out, or give 0"):
        train(tiny_model(), images, replace(RECIPE, hold_out=0.25), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("share", "changed", "taken"),
    [(0.1, (), 0.0), (0.0, ("hold_out",), 0.0), (0.1, ("hold_out",), None), (0.0, ("hold_out", "false_pixels"), 0.0)],
    ids=["default", "0", "a share", "0 and a rate"],
)
def test_a_commands_share_is_replaced_for_validation_images_unless_it_was_asked_for(
    share: float, changed: tuple[str, ...], taken: float | None, images: ImageSet, tmp_path: Path
) -> None:
    recipe = replace(RECIPE, hold_out=share)
    job = TrainingJob(
        source="", out=tmp_path, recipe=recipe, data=DataConfig(), model={}, options={}, changed=frozenset(changed)
    )
    plain = replace(images, validation=())
    if taken is None:
        with pytest.raises(InputError, match="leave hold_out out, or give 0"):
            job.recipe_for(images)
    else:
        assert job.recipe_for(images) == replace(recipe, hold_out=taken)
    if "false_pixels" in changed:
        with pytest.raises(InputError, match="--false-pixels sets a threshold by held-out images; give --hold-out"):
            job.recipe_for(plain)
    else:
        assert job.recipe_for(plain) == recipe


def test_patience_counts_by_validation_images_or_by_held_out_ones(images: ImageSet, tmp_path: Path) -> None:
    patient = replace(RECIPE, meta_epochs=6, lr=1e-30, patience=1)
    assert len(train(tiny_model(), images, patient, tmp_path / "own").losses) < 6
    with pytest.raises(InputError, match="patience counts rounds by images that were held out: give hold_out"):
        train(tiny_model(), noise_set(tmp_path / "noise", train=4), patient, tmp_path / "none")


def test_a_share_is_held_out_where_a_set_has_no_validation_images(images: ImageSet) -> None:
    plain = replace(images, validation=())
    train_samples, held_out = split(plain, replace(RECIPE, hold_out=0.25))
    assert len(held_out) == 1
    assert {*train_samples, *held_out} == {*images.train}
    assert split(plain, RECIPE) == (list(images.train), [])
