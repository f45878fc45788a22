"""Tests docs/mvtec_ad_2.md: its commands and its example, one after the other, on a tiny set of all eight objects."""

import json
import shlex
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
import timm
import torch
from PIL import Image

from fastmsflow import MSFlow
from fastmsflow.__main__ import main
from fastmsflow.data import list_images
from fastmsflow.data.layouts.mvtec_ad_2 import OBJECTS, PRIVATE_SPLITS
from fastmsflow.inference.tiled_predictor import TiledPredictor
from tests.helpers.mvtec_ad_2_tree import write_mvtec_ad_2
from tests.helpers.pages import EXAMPLES, blocks, run_up_to
from tests.helpers.paths import ROOT
from tests.helpers.tolerances import SUBMITTED_MAP

PAGE = ROOT / "docs/mvtec_ad_2.md"
# A backbone of random weights, which need no download, and a short training on small tiles.
SHORT = (
    "--extractor test_resnet.r160_in1k --extractor-weights small.pth --tile 64 --scale 1 --meta-epochs 1 --sub-epochs 1"
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*is not the whole published set")]


def run(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", ["fastmsflow", *args])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code, args


@pytest.fixture(scope="module")
def folder(one_block_flows: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the commands of the page have run."""
    folder = tmp_path_factory.mktemp("page")
    write_mvtec_ad_2(folder / "mvtec_ad_2", size=(64, 96))
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet.r160_in1k").state_dict(), folder / "small.pth")
    commands = [
        shlex.split(line)[1:]
        for block in blocks(PAGE)
        if not block.language
        for line in block.text.replace("\\\n", "").splitlines()
    ]
    assert [args[0] for args in commands] == ["train", "evaluate", "submit", "predict"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        for args in commands:
            run(monkeypatch, *args, *(SHORT.split() if args[0] == "train" else ()))
    return folder


def test_every_validation_image_and_no_training_image_sets_thresholds(folder: Path) -> None:
    for name in OBJECTS:
        results = json.loads((folder / "runs" / name / "results.json").read_text())
        counts = {split: results["images"][split] for split in ("train", "held_out", "test")}
        assert counts == {"train": 4, "held_out": 2, "test": 4}
        calibration = MSFlow.load(folder / "runs" / name / "best.safetensors").calibration
        assert calibration is not None
        assert len(calibration.scores) == 2


def test_evaluation_has_a_row_for_each_object_and_the_mean(folder: Path) -> None:
    rows = json.loads((folder / "runs/evaluation/metrics.json").read_text())
    assert list(dict.fromkeys(row["class"] for row in rows)) == [*OBJECTS, "mean"]
    for name in OBJECTS:
        assert (folder / "runs/evaluation" / name / "report.html").is_file()


def test_the_archive_holds_the_models_maps(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(folder / "submission/submission.tar.gz") as tar:
        assert len(tar.getnames()) == len(OBJECTS) * len(PRIVATE_SPLITS) * 3 * 2
        tar.extractall(tmp_path, filter="data")
    for name in OBJECTS:
        model = MSFlow.load(folder / "runs" / name / "best.safetensors")
        assert model.tiling is not None
        assert model.calibration is not None
        predictor = TiledPredictor(model, model.tiling.tile, model.tiling.overlap, model.tiling.scale)
        threshold = model.calibration.pixel_threshold().value
        for split in PRIVATE_SPLITS:
            for path in list_images(folder / "mvtec_ad_2" / name / split):
                place = f"{name}/{split}/{path.stem}"
                written = tifffile.imread(tmp_path / f"submission/anomaly_images/{place}.tiff")
                marked = np.asarray(Image.open(tmp_path / f"submission/anomaly_images_thresholded/{place}.png"))
                pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
                right = next(iter(predictor.scores([pixels]))).absolute_map[0].numpy()
                bound = SUBMITTED_MAP * right.max()
                np.testing.assert_allclose(written.astype(np.float32), right, rtol=0, atol=bound)
                decided = np.abs(right - threshold) > bound
                assert ((marked == 255) == (right > threshold))[decided].all()


def test_heat_maps_to_look_at_are_drawn(folder: Path) -> None:
    assert len(list((folder / "look").glob("*_heatmap.png"))) == 3


def test_the_example_in_python_runs_and_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (example,) = [example for example in EXAMPLES if example.page == PAGE]
    names = {"run": []}
    run_up_to(example, names)
    assert names["result"].archive == Path("submission/submission.tar.gz")
