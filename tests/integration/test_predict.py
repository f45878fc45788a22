"""``fastmsflow predict`` into a table: scores, labels, regions and thresholds."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmsflow import MSFlow
from fastmsflow.data.image_io import load_image
from tests.helpers.folder_listing import names_in
from tests.helpers.predictions import Command, table_rows

COLUMNS = ["image", "score", "log_score", "absolute_score", "label", "threshold", "heat_map", "regions",
           "largest_region"]  # fmt: skip


@pytest.fixture(scope="module")
def uncalibrated_checkpoint(brick_model: MSFlow, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "uncalibrated.safetensors"
    calibration, brick_model.calibration = brick_model.calibration, None
    brick_model.save(path)
    brick_model.calibration = calibration
    return path


def test_the_table_has_scores_labels_and_regions_highest_first(
    brick_checkpoint: Path, brick_model: MSFlow, brick_tiles: Path, predict: Command, tmp_path: Path
) -> None:
    code, out, err = predict(brick_checkpoint, brick_tiles, "--out", tmp_path, "--batch-size", 4)
    assert (code, err) == (0, "")
    rows = table_rows(tmp_path)
    assert list(rows[0]) == COLUMNS
    assert sorted(row["image"] for row in rows) == sorted(map(str, brick_tiles.iterdir()))
    scores = [float(row["absolute_score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert [row["label"] for row in rows] == ["defective"] * 3 + ["good"] * 3
    assert "3 of 6 defective; threshold" in out
    assert brick_model.calibration is not None
    limit = brick_model.calibration.threshold().value
    assert all(float(row["threshold"]) == limit for row in rows)
    assert all((score > limit) == (row["label"] == "defective") for score, row in zip(scores, rows, strict=True))
    for row in rows:
        assert int(row["regions"]) >= 1
        assert 0 < int(row["largest_region"]) <= 96 * 80
        with Image.open(tmp_path / row["heat_map"]) as picture:
            picture.load()
            assert picture.width > 2 * 256
            assert picture.height > 256 * 80 // 96
    assert len(names_in(tmp_path)) == 7


def test_scores_are_those_of_the_model_whatever_the_batch(
    brick_checkpoint: Path, brick_model: MSFlow, brick_tiles: Path, predict: Command, tmp_path: Path
) -> None:
    predict(brick_checkpoint, brick_tiles, "--out", tmp_path, "--batch-size", 5, "--no-heat-maps")
    assert names_in(tmp_path) == {"scores.csv"}
    for row in table_rows(tmp_path):
        with torch.no_grad():
            scores = brick_model.scores(load_image(row["image"], (64, 64))[None])
        for column in ("score", "log_score", "absolute_score"):
            assert float(row[column]) == pytest.approx(float(getattr(scores, column)), rel=1e-4)
        assert row["heat_map"] == ""


def test_json_lines_have_every_region_in_pixels_of_the_image(
    brick_checkpoint: Path, brick_tiles: Path, predict: Command, tmp_path: Path
) -> None:
    code, _, _ = predict(brick_checkpoint, brick_tiles / "0.png", "--out", tmp_path, "--format", "jsonl")
    assert code == 0
    (row,) = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert list(row) == COLUMNS[:-1]
    areas = [region["area"] for region in row["regions"]]
    assert areas == sorted(areas, reverse=True)
    for region in row["regions"]:
        left, top, right, bottom = region["box"]
        assert 0 <= left < right <= 96
        assert 0 <= top < bottom <= 80
        assert region["peak"] > 0
        outline = np.array(region["outline"])
        assert np.array_equal(outline[0], outline[-1])
        assert (outline.min(axis=0).tolist(), outline.max(axis=0).tolist()) == ([left, top], [right, bottom])


def test_the_summary_as_json_is_all_that_is_printed(
    brick_checkpoint: Path, brick_tiles: Path, predict: Command, tmp_path: Path
) -> None:
    (tmp_path / "bad.png").write_bytes(b"")
    code, out, _ = predict(brick_checkpoint, brick_tiles, tmp_path / "bad.png", "--out", tmp_path / "out", "--json")
    summary = json.loads(out)
    assert code == 1
    assert (summary["images"], summary["good"], summary["defective"]) == (6, 3, 3)
    assert len(summary["skipped"]) == 1
    assert summary["scores"] == str(tmp_path / "out/scores.csv")
    assert summary["region_threshold"] > 0
    assert predict(brick_checkpoint, brick_tiles, "--out", tmp_path / "out", "--quiet") == (0, "", "")


def test_a_threshold_given_counts_more_than_the_calibrated_one(
    brick_checkpoint: Path, brick_tiles: Path, predict: Command, tmp_path: Path
) -> None:
    _, out, _ = predict(brick_checkpoint, brick_tiles, "--out", tmp_path, "--threshold", 1e9, "--no-heat-maps")
    assert "0 of 6 defective; threshold 1e+09 nats, as given" in out
    code, _, err = predict(brick_checkpoint, brick_tiles, "--out", tmp_path, "--threshold", "nan")
    assert (code, err) == (1, "fastmsflow: --threshold is nan; it must be finite")


def test_a_rate_of_false_alarms_that_cannot_be_had_is_refused(
    brick_checkpoint: Path, brick_tiles: Path, predict: Command, tmp_path: Path
) -> None:
    assert predict(brick_checkpoint, brick_tiles, "--out", tmp_path, "--false-alarms", 0.5, "--no-heat-maps")[0] == 0
    code, _, err = predict(brick_checkpoint, brick_tiles, "--out", tmp_path / "out", "--false-alarms", 0.001)
    assert code == 1
    assert "needs 999 held-out good images, and there are 20" in err
    assert not (tmp_path / "out").exists()


def test_an_uncalibrated_model_scores_without_labels_and_says_how_to_get_them(
    uncalibrated_checkpoint: Path, brick_tiles: Path, predict: Command, tmp_path: Path
) -> None:
    code, out, _ = predict(uncalibrated_checkpoint, brick_tiles, "--out", tmp_path)
    assert code == 0
    assert "fastmsflow calibrate MODEL GOOD_IMAGES" in out
    assert {(row["label"], row["threshold"], row["regions"]) for row in table_rows(tmp_path)} == {("", "", "")}
    predict(uncalibrated_checkpoint, brick_tiles, "--out", tmp_path, "--threshold", 0, "--no-heat-maps")
    assert {row["label"] for row in table_rows(tmp_path)} == {"defective"}
    code, _, err = predict(uncalibrated_checkpoint, brick_tiles, "--out", tmp_path, "--false-alarms", 0.1)
    assert code == 1
    assert "not calibrated" in err


def test_options_come_from_a_file(brick_checkpoint: Path, brick_tiles: Path, predict: Command, tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text(f"format: jsonl\nheat_maps: false\nout: {tmp_path / 'out'}\n")
    assert predict(brick_checkpoint, brick_tiles, "--config", tmp_path / "options.yaml")[0] == 0
    assert names_in(tmp_path / "out") == {"scores.jsonl"}
    code, _, err = predict(brick_checkpoint, brick_tiles, "--format", "xml")
    assert (code, err) == (1, "fastmsflow: format xml: give csv, jsonl or parquet")
