"""Every way to score images scores them in tiles if the model says so, as TiledPredictor does."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fastmsflow import InputError, MSFlow
from fastmsflow.calibration import DecisionThreshold, region_threshold
from fastmsflow.errors import InputWarning
from fastmsflow.evaluation.calibrate_model import calibrate_on_files
from fastmsflow.inference import BatchScorer, TiledPredictor
from fastmsflow.inference.predict_parquet import score_into, settings_of
from fastmsflow.inference.prediction_folder import PredictionFolder
from fastmsflow.inference.prediction_sources import Files
from fastmsflow.inference.predictor import Predictor
from fastmsflow.inference.scorer import Scorer
from fastmsflow.inference.tiled_models import TileOptions, retile
from fastmsflow.models.checkpoint import write_checkpoint
from fastmsflow.scoring import Scores
from fastmsflow.tiling import Tiling
from tests.helpers.tiny_model import tiny_model
from tests.helpers.tolerances import EXPORTED_MAPS

SIZES = [(40, 70), (32, 32), (33, 95), (64, 50)]
TILING = Tiling(32, 0.25, top_share=0.1)
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def nothing(done: int) -> None:
    pass


@pytest.fixture(scope="module")
def arrays() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]


@pytest.fixture(scope="module")
def files(arrays: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def model(files: list[Path]) -> MSFlow:
    """A model of tiles; one of the images is above its threshold, and some pixels of it are in regions."""
    made = tiny_model().eval()
    made.tiling = TILING
    made.calibration = calibrate_on_files(made, files, false_alarms=0.4)
    return made


@pytest.fixture(scope="module")
def expected(model: MSFlow, arrays: list[np.ndarray]) -> list[Scores]:
    images = [torch.from_numpy(array).permute(2, 0, 1) for array in arrays]
    return list(TiledPredictor(model.for_inference(), 32, 0.25).scores(images))


@pytest.fixture
def checkpoint(model: MSFlow, tmp_path: Path) -> Path:
    model.save(tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_a_calibration_has_the_scores_and_peaks_of_whole_images(model: MSFlow, expected: list[Scores]) -> None:
    assert model.calibration is not None
    scores = [each.absolute_score.item() for each in expected]
    np.testing.assert_allclose(model.calibration.scores, scores, rtol=1e-5)
    np.testing.assert_allclose(model.calibration.peaks, [s.absolute_map.max().item() for s in expected], rtol=1e-5)


def test_a_tiling_is_saved_with_its_model(checkpoint: Path) -> None:
    assert MSFlow.load(checkpoint).tiling == TILING


@pytest.mark.parametrize("workers", [0, 2])
def test_tables_and_pictures_are_of_whole_images_at_their_own_size(
    model: MSFlow, files: list[Path], expected: list[Scores], tmp_path: Path, *, workers: int
) -> None:
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"no image")
    out = tmp_path / "out"
    decision = DecisionThreshold.from_calibration(model.calibration, None, None)
    predictor = Predictor(model, out, table="jsonl", decision=decision, batch_size=3)
    done: list[int] = []
    predictor.run([files[0], damaged, *files[1:]], workers, done.append)
    assert done == [1, 2, 3, 4, 5]
    assert len(predictor.faults) == 1
    rows = {Path(row["image"]).name: row for row in map(json.loads, (out / "scores.jsonl").read_text().splitlines())}
    for file, scores, (height, width) in zip(files, expected, SIZES, strict=True):
        row = rows[file.name]
        assert row["absolute_score"] == pytest.approx(scores.absolute_score.item(), rel=1e-5)
        with Image.open(out / row["heat_map"]) as picture:
            assert picture.width >= 2 * width
            assert picture.height > height
        for region in row["regions"]:
            left, top, right, bottom = region["box"]
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            highest = scores.absolute_map[0, int(top) : round(bottom) + 1, int(left) : round(right) + 1].max().item()
            assert region["peak"] == pytest.approx(highest, rel=1e-4)
    assert {row["label"] for row in rows.values()} == {"good", "defective"}
    assert any(row["regions"] for row in rows.values())


@pytest.mark.parametrize(
    "column",
    [
        lambda arrays, files: {"path": [str(file) for file in files]},
        lambda arrays, files: {"bytes": [file.read_bytes() for file in files]},
        lambda arrays, files: {"image": arrays},
        lambda arrays, files: {"image": [array / np.float32(255) for array in arrays]},
        lambda arrays, files: pa.table({"path": [str(file) for file in files]}),
    ],
    ids=["path", "bytes", "uint8", "floats", "arrow"],
)
def test_batches_of_any_engine_are_scored_in_tiles(
    column: Callable[[Any, Any], Any], checkpoint: Path, arrays: list, files: list, expected: list[Scores]
) -> None:
    results = BatchScorer(checkpoint, maps=True, device="cpu")(column(arrays, files))
    if isinstance(results, pa.Table):
        results = {name: results[name].to_pylist() for name in results.column_names}
    assert list(results["absolute_score"]) == pytest.approx([s.absolute_score.item() for s in expected], rel=1e-5)
    for found, scores in zip(results["score_map"], expected, strict=True):
        torch.testing.assert_close(torch.tensor(np.array(found, np.float32)), scores.absolute_map[0], **CLOSE)


@pytest.mark.filterwarnings("error")
def test_floats_that_are_read_only_or_run_backward_are_scored_in_tiles(checkpoint: Path) -> None:
    pixels = np.random.default_rng(0).random((40, 50, 3), np.float32)
    backward, fixed = pixels[::-1, ::-1], pixels.copy()
    fixed.flags.writeable = False
    scorer = BatchScorer(checkpoint, device="cpu")
    expected = scorer({"image": [backward.copy(), pixels]})
    found = scorer({"image": [backward, fixed]})
    assert list(found["fault"]) == [None, None]
    assert list(found["absolute_score"]) == list(expected["absolute_score"])


def test_a_batch_scorer_takes_a_tiling_of_its_own(checkpoint: Path, files: list[Path], expected: list[Scores]) -> None:
    batch = {"path": [str(file) for file in files]}
    with pytest.warns(InputWarning, match="the model's thresholds are of images in tiles .* are not used"):
        results = BatchScorer(checkpoint, overlap=0.5, top_share=0.03)(batch)
    assert list(results["defective"]) == [None] * len(files)
    assert np.abs(results["absolute_score"] - [s.absolute_score.item() for s in expected]).max() > 1e-3


def test_parquet_has_the_scores_of_whole_images(
    model: MSFlow, files: list[Path], expected: list[Scores], tmp_path: Path
) -> None:
    regions = region_threshold(model.calibration, None)
    folder, scorer = PredictionFolder(str(tmp_path / "out")), Scorer(model, region_threshold=regions, tiles=3)
    folder.begin(settings_of(scorer))
    images = Files([str(file) for file in files])
    score_into(folder, images, scorer, batch_size=8, images_per_part=3, workers=0, progress=nothing)
    table = pq.read_table(tmp_path / "out" / "parts").to_pydict()
    assert table["path"] == images.paths
    assert table["absolute_score"] == pytest.approx([s.absolute_score.item() for s in expected], rel=1e-5)


def test_openvino_computes_the_same_tiles(model: MSFlow, files: list[Path], tmp_path: Path) -> None:
    found = []
    for engine in ("torch", "openvino"):
        predictor = Predictor(model, tmp_path / engine, pictures=False, engine=engine)
        predictor.run(files, 0, nothing)
        with (tmp_path / engine / "scores.csv").open() as table:
            found.append([float(row["absolute_score"]) for row in csv.DictReader(table)])
    np.testing.assert_allclose(*found, rtol=EXPORTED_MAPS)


def test_openvino_is_refused_where_places_of_tiles_count(tmp_path: Path) -> None:
    placed = tiny_model().eval()
    placed.tiling = Tiling(32, position="image")
    with pytest.raises(InputError, match=r"--position image\); give the engine torch$"):
        Predictor(placed, tmp_path / "out", engine="openvino")


def test_another_tiling_takes_the_thresholds_away_and_says_so(checkpoint: Path) -> None:
    calibrated = MSFlow.load(checkpoint)
    assert retile(calibrated, TileOptions()) is calibrated
    assert retile(calibrated, TileOptions(tile=32)).calibration is not None
    with pytest.warns(InputWarning, match=r"^the model's thresholds are of .*, not of .*`fastmsflow calibrate` with"):
        changed = retile(calibrated, TileOptions(tile=64))
    assert (changed.image_size, changed.calibration) == ((64, 64), None)
    assert changed.tiling == Tiling(64, 0.25, top_share=0.1)


def test_a_checkpoint_whose_tiles_are_not_of_its_models_size_is_refused(model: MSFlow, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    config = {**model.config, "tiling": Tiling(64).config}
    write_checkpoint(path, model.state_dict(), config)
    with pytest.raises(InputError, match=r"is damaged \(tiling.tile is 64, image_size \[32, 32\]\); write"):
        MSFlow.load(path)


def test_an_overlap_without_tiles_is_refused() -> None:
    with pytest.raises(InputError, match=r"^overlap and top_share: this is of tiles, .*; give tile too$"):
        retile(tiny_model(), TileOptions(overlap=0.5, top_share=0.1))
