"""Msflow in anomalib's pipelines, which make models by class path: benchmark and tiled ensemble."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("anomalib", reason="anomalib is not installed: pip install 'fastmsflow[anomalib]'")

from anomalib.engine import Engine
from anomalib.models import get_model
from anomalib.pipelines import Benchmark
from anomalib.pipelines.components.base import Pipeline
from anomalib.pipelines.tiled_ensemble import EvalTiledEnsemble, TrainTiledEnsemble
from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import Resize

from fastmsflow import InputError, MSFlow
from fastmsflow.integrations import anomalib as integration
from fastmsflow.integrations.anomalib import VERSION, Msflow
from tests.helpers.small_anomalib import PARTS, QUIET, SIDE, UNTRAINED, noise_data, noise_set

pytestmark = pytest.mark.slow

CLASS_PATH = "fastmsflow.integrations.anomalib.Msflow"


@pytest.mark.parametrize("name", [{"class_path": CLASS_PATH, "init_args": UNTRAINED}, "msflow", "Msflow"])
def test_a_pipeline_names_the_model(name: Any) -> None:
    options = {} if isinstance(name, dict) else UNTRAINED
    model = get_model(name, **options)
    assert isinstance(model, Msflow)
    assert model.msflow.image_size == (SIDE, SIDE)


def run(pipeline: Pipeline, config: dict[str, Any], folder: Path) -> None:
    file = folder / "pipeline.yaml"
    file.write_text(json.dumps(config))
    pipeline.run(pipeline.get_parser().parse_args(["--config", str(file)]))


def data(folder: Path) -> dict[str, Any]:
    """The options of ``noise_data`` as a pipeline's file has them, and masks, without which nothing can be tiled."""
    noise_set(folder / "noise", train=4)
    (folder / "noise/masks").mkdir()
    for file in (folder / "noise/test/bad").iterdir():
        Image.fromarray(np.tri(40, dtype=np.uint8) * 255).save(folder / "noise/masks" / file.name)
    sizes = {"train_batch_size": 2, "eval_batch_size": 3, "num_workers": 0}
    splits = {"val_split_mode": "same_as_test", "test_split_mode": "from_dir"}
    options = {"name": "noise", "root": str(folder / "noise"), **PARTS, "mask_dir": "masks", **sizes, **splits}
    return {"class_path": "Folder", "init_args": options}


@pytest.mark.skipif(VERSION < (2, 7), reason="anomalib's tiled ensemble fails on a pre-processor that only resizes")
def test_a_tiled_ensemble_is_trained_and_its_metrics_are_written(tmp_path: Path, monkeypatch) -> None:
    def small_model(extractor, pretrained, *, image_size, pool, standardise, **others) -> MSFlow:
        return MSFlow(UNTRAINED["extractor"], False, image_size, pool, standardise=standardise, blocks=(1, 1, 1))

    # anomalib's tiled ensemble takes no init_args.
    monkeypatch.setattr(integration, "MSFlow", small_model)
    monkeypatch.chdir(tmp_path)
    config = {
        "seed": 1,
        "accelerator": "cpu",
        "default_root_dir": str(tmp_path),
        "tiling": {"image_size": [SIDE, 2 * SIDE], "tile_size": [SIDE, SIDE], "stride": SIDE},
        "normalization_stage": "image",
        "thresholding_stage": "image",
        "data": data(tmp_path),
        "SeamSmoothing": {"apply": False, "sigma": 2, "width": 0.1},
        "TrainModels": {"model": {"class_path": CLASS_PATH}, "trainer": {"max_epochs": 1, **QUIET}},
    }
    train = TrainTiledEnsemble()
    run(train, config, tmp_path)
    run(EvalTiledEnsemble(train.root_dir), config, tmp_path)
    assert len(list(train.root_dir.rglob("*.ckpt"))) == 2
    (metrics,) = train.root_dir.rglob("metric_results.csv")
    assert metrics.read_text().startswith("image_AUROC,image_F1Score")


def test_benchmark_trains_and_tests_the_model(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Msflow, "trainer_arguments", {"max_epochs": 1, "num_sanity_val_steps": 0})
    monkeypatch.chdir(tmp_path)
    model = {"class_path": CLASS_PATH, "init_args": {**UNTRAINED, "image_size": list(UNTRAINED["image_size"])}}
    config = {"accelerator": "cpu", "benchmark": {"seed": 1, "model": model, "data": data(tmp_path)}}
    run(Benchmark(), config, tmp_path)
    (results,) = tmp_path.rglob("results.csv")
    assert "image_AUROC" in results.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"^images are \(10, 10\); this model takes \(512, 512\): resize them$"),
        ({"image_size": (SIDE, SIDE)}, r"^images are \(10, 10\); this model takes \(64, 64\): resize them$"),
    ],
)
@pytest.mark.parametrize("standardise", [False, True])
def test_sizes_that_do_not_fit_are_refused_by_the_first_images(
    options: dict, message: str, standardise: bool, tmp_path: Path
) -> None:
    tiny = PreProcessor(transform=Resize((10, 10)))
    model = Msflow(**{**UNTRAINED, "image_size": None, **options}, standardise=standardise, pre_processor=tiny)
    assert [metric.name for metric in model.evaluator.test_metrics][:2] == ["image_AUROC", "image_F1Score"]
    engine = Engine(max_epochs=1, default_root_dir=tmp_path, **QUIET)
    with pytest.raises(InputError, match=message):
        engine.fit(model, datamodule=noise_data(tmp_path / "noise"))
