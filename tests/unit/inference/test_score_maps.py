"""Score maps that people look at and judge by: each image's own, whatever is in the batch; the one asked for."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as photographs

from fastmsflow import MSFlow
from fastmsflow.calibration import Calibration
from fastmsflow.data import list_images
from fastmsflow.data.image_io import load_image
from fastmsflow.scoring import MAP_KINDS
from fastmsflow.training import Evaluation, TrainingResult
from fastmsflow.training.training_result import EpochResult

SIDE = 64


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiles")
    for i in range(4):
        Image.fromarray(photographs.brick()[i * 90 : i * 90 + 80, 60:156]).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def pixels(images: Path) -> torch.Tensor:
    return torch.stack([load_image(file, (SIDE, SIDE)) for file in list_images(images)])


@pytest.fixture(scope="module")
def network() -> MSFlow:
    torch.manual_seed(0)
    return MSFlow("test_efficientnet", pretrained=False, image_size=(SIDE, SIDE), blocks=(1, 1, 1)).eval()


@pytest.fixture(scope="module")
def uncalibrated(network: MSFlow, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "uncalibrated.safetensors"
    network.save(path)
    return path


@pytest.fixture(scope="module")
def calibrated(network: MSFlow, pixels: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every image has a region."""
    path = tmp_path_factory.mktemp("model") / "calibrated.safetensors"
    maps = network.scores(pixels).absolute_map.detach().flatten(1)
    peak = 0.9 * float(maps.amax(dim=1).min())
    network.calibration = Calibration((peak,) * 20, (peak,) * 20, float(maps.median()))
    network.save(path)
    network.calibration = None
    return path


def test_what_is_predicted_of_an_image_does_not_depend_on_the_batch(network: MSFlow, pixels: torch.Tensor) -> None:
    together = network.predict(pixels)
    for i in range(len(pixels)):
        for one, other in zip(network.predict(pixels[i : i + 1]), together, strict=True):
            torch.testing.assert_close(one[0], other[i], rtol=1e-5, atol=1e-5)
    assert together.score_map_add.amin(dim=(1, 2)).tolist() == [0] * len(pixels)


def test_an_image_of_nan_spoils_nothing_of_its_neighbours(network: MSFlow, pixels: torch.Tensor) -> None:
    spoilt = pixels.clone()
    spoilt[1] = float("nan")
    for one, other in zip(network.predict(spoilt), network.predict(pixels), strict=True):
        assert one[1].isnan().any()
        torch.testing.assert_close(one[[0, 2, 3]], other[[0, 2, 3]], rtol=1e-5, atol=1e-5)


def pictures(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(folder.glob("*_heatmap.png"))]


@pytest.mark.parametrize("kind", MAP_KINDS)
def test_predict_draws_the_map_that_is_asked_for(kind: str, images: Path, calibrated: Path, predict, tmp_path) -> None:
    code, out, _ = predict(calibrated, images, "--out", tmp_path / kind, "--map", kind, "--format", "jsonl")
    assert code == 0 and f"heat maps ({kind})" in out
    assert predict(calibrated, images, "--out", tmp_path / "default", "--format", "jsonl")[0] == 0
    drawn, usual = pictures(tmp_path / kind), pictures(tmp_path / "default")
    assert len(drawn) == 4
    assert (drawn == usual) == (kind == "absolute")
    # Scores, labels and regions are the same: regions are of the absolute map.
    rows = [(tmp_path / name / "scores.jsonl").read_text() for name in (kind, "default")]
    assert rows[0] == rows[1]
    assert all(json.loads(line)["regions"] for line in rows[0].splitlines())


def test_without_a_calibration_the_additive_map_is_drawn(images: Path, uncalibrated: Path, predict, tmp_path) -> None:
    code, out, _ = predict(uncalibrated, images, "--out", tmp_path / "default")
    assert code == 0 and "heat maps (additive)" in out
    for kind in ("additive", "multiplicative"):
        assert predict(uncalibrated, images, "--out", tmp_path / kind, "--map", kind)[0] == 0
    assert pictures(tmp_path / "additive") == pictures(tmp_path / "default")
    assert pictures(tmp_path / "multiplicative") != pictures(tmp_path / "default")


def test_maps_that_cannot_be_drawn_are_refused_before_anything_is_scored(
    images: Path, uncalibrated: Path, predict, tmp_path: Path
) -> None:
    for options, says in (
        (("--map", "absolute"), "no scale, since this model is not calibrated: `fastmsflow calibrate"),
        (("--map", "add"), "map 'add' is not known; choose one of absolute, additive, multiplicative"),
        (("--map", "additive", "--format", "parquet"), "--map is of heat maps, and none are written here"),
        (("--map", "additive", "--no-heat-maps"), "--map is of heat maps, and none are written here"),
    ):
        code, _, text = predict(uncalibrated, images, "--out", tmp_path / "out", *options)
        assert code == 1 and says in text
        assert "Traceback" not in text and text.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_report_shows_the_map_that_is_asked_for(uncalibrated: Path, mvtec: Path, command, tmp_path: Path) -> None:
    pages = {}
    for kind in ("additive", "multiplicative"):
        code, _ = command("evaluate", uncalibrated, mvtec, "--out", tmp_path / kind, "--map", kind)
        assert code == 0
        pages[kind] = (tmp_path / kind / "report.html").read_text()
        assert f"{kind} score map" in pages[kind]
    assert pages["additive"].count("multiplicative score map") == 0
    code, text = command("evaluate", uncalibrated, mvtec, "--out", tmp_path / "absolute", "--map", "absolute")
    assert code == 1 and "no scale" in text
    assert not list(tmp_path.glob("absolute/report.html"))


def test_both_pixel_aurocs_are_reported_and_a_pro_that_is_not_defined_is_no_number(
    network: MSFlow, mvtec: Path, command, tmp_path: Path
) -> None:
    """Features a thousand times too large: nearly every pixel of the multiplicative maps is 1."""
    model = MSFlow(
        "test_efficientnet", pretrained=False, image_size=(SIDE, SIDE), blocks=(1, 1, 1), standardise=True
    ).eval()
    assert model.standardiser is not None
    for name, buffer in model.standardiser.named_buffers():
        if name.startswith("std"):
            buffer.fill_(1e-3)
    model.save(tmp_path / "model.safetensors")
    code, out = command("evaluate", tmp_path / "model.safetensors", mvtec, "--out", tmp_path / "out")
    assert code == 0
    lines = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in out.splitlines() if "│" in line}
    assert lines["AUPRO (published)"] == "-"
    (row,) = json.loads((tmp_path / "out/metrics.json").read_text())
    assert row["aupro_published"] is None
    for key, name in (("pixel_auroc", "pixel AUROC"), ("pixel_auroc_absolute", "pixel AUROC (absolute)")):
        assert lines[name] == f"{row[key]:.4f}"
    assert row["pixel_auroc"] != row["pixel_auroc_absolute"]
    with (tmp_path / "out/metrics.csv").open() as file:
        (written,) = csv.DictReader(file)
    assert written["aupro_published"] == ""
    assert '"AUPRO (published)":null' in (tmp_path / "out/report.html").read_text()
    assert np.isfinite(row["aupro"])


def test_the_summary_of_a_run_tells_of_a_pro_that_is_not_defined() -> None:
    defined, undefined = (Evaluation(0.5, 0.5, 0.5, aupro=0.4, aupro_published=value) for value in (0.3, None))
    results = [EpochResult(4, defined, None), EpochResult(8, undefined, None)]
    result = TrainingResult(losses=[], epoch_results=results, test_result=None, seconds={}, speed={})
    assert result.summary()["aupro_published"] == {
        "last": {"value": None, "epoch": 8}, "best on test": {"value": 0.3, "epoch": 4},
    }  # fmt: skip
    assert result.by_choice()["last"]["aupro_published"] is None
    # A set without masks has no such row.
    without_masks = [EpochResult(4, Evaluation(0.5, 0.5, 0.5), None)]
    assert "aupro_published" not in replace(result, epoch_results=without_masks).summary()
