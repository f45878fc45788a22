"""BatchScorer: the same scores as `predict`, one load, threads and copies, and one line for everything it refuses."""

import copy
import csv
import json
import multiprocessing
import os
import pickle
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastmsflow import InputError, MSFlow
from fastmsflow.data import load_image
from fastmsflow.inference import BatchScorer, batch_scorer
from fastmsflow.inference.scorer import Scorer
from tests.helpers.batches import BOX, IMAGES, SCORES, SIZE, assert_same, on_cpu
from tests.helpers.tolerances import OTHER_BATCH

# The same as predict's


@pytest.mark.parametrize("size", [1, 5, IMAGES])
def test_scores_labels_and_regions_are_those_of_predict(
    size: int,
    batch_checkpoint: Path,
    batch_images: list[Path],
    scorer: BatchScorer,
    predict: Callable[..., Any],
    tmp_path: Path,
) -> None:
    rows: list[dict[str, Any]] = []
    for start in range(0, IMAGES, size):
        results = scorer({"path": [str(path) for path in batch_images[start : start + size]]})
        assert list(results["fault"]) == [None] * len(results["fault"])
        names = {name: column.tolist() for name, column in results.items() if name != "path"}
        rows += [dict(zip(names, row, strict=True)) for row in zip(*names.values(), strict=True)]
    assert 0 < sum(row["defective"] for row in rows) < IMAGES
    assert 0 < sum(row["largest_region"] > 0 for row in rows) < IMAGES
    options = ("--batch-size", size, "--dtype", "float32", "--no-heat-maps", "--workers", 0, "--quiet")
    for form in ("csv", "jsonl"):
        assert predict(batch_checkpoint, batch_images[0].parent, "--out", tmp_path, "--format", form, *options)[0] == 0
    with (tmp_path / "scores.csv").open(newline="") as file:
        as_csv = {row["image"]: row for row in csv.DictReader(file)}
    as_lines = {row["image"]: row for row in map(json.loads, (tmp_path / "scores.jsonl").read_text().splitlines())}
    for path, row in zip(map(str, batch_images), rows, strict=True):
        for name in SCORES:
            assert (float(as_csv[path][name]), as_lines[path][name]) == (row[name], row[name])
        label = "defective" if row["defective"] else "good"
        assert (as_csv[path]["label"], as_lines[path]["label"]) == (label, label)
        assert int(as_csv[path]["largest_region"]) == row["largest_region"]
        regions = as_lines[path]["regions"]
        if regions:
            assert regions[0]["area"] == row["largest_region"]
            assert regions[0]["box"] == [round(row[name], 1) for name in BOX]
        else:
            assert row["largest_region"] == 0
            assert all(np.isnan(row[name]) for name in BOX)


def test_the_size_of_a_batch_changes_no_more_than_rounding(
    scorer: BatchScorer, batch_contents: list[bytes], expected: dict[str, Any]
) -> None:
    for size in (1, 5):
        parts = [scorer({"bytes": batch_contents[start : start + size]}) for start in range(0, IMAGES, size)]
        for name in SCORES:
            found = np.concatenate([part[name] for part in parts])
            np.testing.assert_allclose(found, expected[name], rtol=OTHER_BATCH, atol=0)


def test_labels_are_by_the_threshold_that_was_given(
    batch_checkpoint: Path, batch_contents: list[bytes], expected: dict[str, Any]
) -> None:
    limit = float(np.sort(expected["absolute_score"])[-3])
    results = on_cpu(batch_checkpoint, threshold=limit)({"bytes": batch_contents})
    assert results["defective"].tolist() == (expected["absolute_score"] > limit).tolist()
    assert sum(results["defective"]) == 2
    np.testing.assert_array_equal(results["largest_region"], expected["largest_region"])


def test_labels_and_regions_are_by_the_rate_of_false_alarms(batch_model: MSFlow, batch_contents: list[bytes]) -> None:
    calibrated, low, high = copy.deepcopy(batch_model), -1e9, 1e9
    assert calibrated.calibration is not None
    held_out = (*(low,) * 10, *(high,) * 10)
    object.__setattr__(calibrated.calibration, "scores", held_out)
    object.__setattr__(calibrated.calibration, "peaks", held_out)
    for rate, defective, whole in ((0.1, False, False), (0.9, True, True)):
        results = on_cpu(calibrated, false_alarms=rate)({"bytes": batch_contents[:4]})
        assert results["defective"].tolist() == [defective] * 4
        assert (results["largest_region"] > 0).tolist() == [whole] * 4
    with pytest.raises(InputError, match="needs 999 held-out good images, and there are 20"):
        on_cpu(calibrated, false_alarms=0.001).load()


def test_a_model_without_calibration_leaves_labels_and_regions_null(
    batch_model: MSFlow, batch_contents: list[bytes], expected: dict[str, Any]
) -> None:
    plain = copy.deepcopy(batch_model)
    plain.calibration = None
    results = on_cpu(plain)({"bytes": batch_contents})
    assert results["defective"].tolist() == [None] * IMAGES
    assert all(np.isnan(results[name]).all() for name in ("largest_region", *BOX))
    np.testing.assert_array_equal(results["score"], expected["score"])
    given = on_cpu(plain, threshold=-1e9)({"bytes": batch_contents})
    assert given["defective"].tolist() == [True] * IMAGES
    with pytest.raises(InputError, match="this model is not calibrated"):
        on_cpu(plain, false_alarms=0.1).load()


def test_maps_are_the_absolute_maps_of_the_model(
    batch_model: MSFlow, batch_checkpoint: Path, batch_images: list[Path]
) -> None:
    paths = [*map(str, batch_images[:2]), "none.png", str(batch_images[2])]
    maps = on_cpu(batch_checkpoint, maps=True)({"path": paths})["score_map"]
    assert (maps.shape, maps.dtype) == ((4, *SIZE), np.float32)
    assert np.isnan(maps[2]).all()
    ready = batch_model.for_inference()
    with torch.no_grad():
        of_model = ready.scores(torch.stack([load_image(path, SIZE) for path in batch_images[:3]])).absolute_map
    np.testing.assert_array_equal(maps[[0, 1, 3]], of_model.numpy())


def test_a_score_that_is_not_finite_is_a_fault(batch_model: MSFlow, batch_images: list[Path]) -> None:
    broken = copy.deepcopy(batch_model)
    with torch.no_grad():
        next(iter(broken.flow.parameters())).fill_(torch.nan)
    results = on_cpu(broken)({"path": [str(batch_images[0])]})
    assert np.isnan(results["score"][0])
    assert results["defective"][0] is None
    assert results["fault"][0].startswith(f"{batch_images[0]}: its score is not finite")


# Copies, threads, processes


@pytest.mark.parametrize("how", ["pickle", "cloudpickle", "copy"])
@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("given", ["path", "model"])
def test_a_copy_scores_the_same(
    how: str,
    loaded: bool,
    given: str,
    batch_checkpoint: Path,
    batch_model: MSFlow,
    batch_contents: list[bytes],
    expected: dict[str, Any],
) -> None:
    original = on_cpu(batch_model if given == "model" else batch_checkpoint, threshold=0.5, maps=True)
    if loaded:
        original.load()
    if how == "copy":
        twin = copy.deepcopy(original)
    else:
        pickler = pytest.importorskip(how)
        content = pickler.dumps(original)
        assert given == "model" or len(content) < 1000
        twin = pickle.loads(content)
    results = twin({"bytes": batch_contents})
    np.testing.assert_array_equal(results["score"], expected["score"])
    assert results["defective"].tolist() == (expected["absolute_score"] > 0.5).tolist()
    assert results["score_map"].shape == (IMAGES, *SIZE)


def test_it_loads_once_however_many_threads_begin(
    batch_checkpoint: Path, batch_contents: list[bytes], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    load, loads, together = MSFlow.load, [], threading.Barrier(8)

    def slow(path: Any) -> MSFlow:
        loads.append(path)
        time.sleep(0.1)
        return load(path)

    monkeypatch.setattr(MSFlow, "load", slow)
    scorer = on_cpu(batch_checkpoint)
    assert loads == []

    def score(_: int) -> Any:
        together.wait()
        return scorer({"bytes": batch_contents})

    with ThreadPoolExecutor(8) as threads:
        for results in threads.map(score, range(8)):
            assert_same(results, expected)
    assert loads == [str(batch_checkpoint)]


def test_threads_get_the_results_of_their_own_batches(scorer: BatchScorer, batch_contents: list[bytes]) -> None:
    damaged = batch_contents[0][:-200]
    batches = [{"bytes": [*batch_contents[i:], damaged, *batch_contents[:i]][: i + 3]} for i in range(8)] * 2
    alone = [scorer(batch) for batch in batches]
    before, interval = list(warnings.filters), sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-6)
        with ThreadPoolExecutor(8) as threads:
            together = list(threads.map(scorer, batches))
    finally:
        sys.setswitchinterval(interval)
    for results, wanted in zip(together, alone, strict=True):
        assert_same(results, wanted)
    assert any(fault for results in alone for fault in results["fault"])
    assert warnings.filters == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_process_that_was_forked_after_loading_scores_too(
    scorer: BatchScorer, batch_contents: list[bytes], expected: dict[str, Any]
) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=lambda: theirs.send(scorer({"bytes": batch_contents})), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        process.start()
    try:
        assert ours.poll(20), "the forked process waits for threads that it does not have"
        assert_same(ours.recv(), expected)
    finally:
        process.kill()
        process.join()


def test_a_large_batch_is_read_and_kept_a_few_images_at_a_time(
    batch_checkpoint: Path, batch_contents: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_scorer, "BATCH_SIZE", 4)
    read, score = batch_scorer._read, Scorer.__call__
    pixels: list[Any] = []
    maps: list[Any] = []
    alive: list[tuple[int, int]] = []

    def noted_read(*args: Any) -> Any:
        result = read(*args)
        pixels.append(weakref.ref(result[0]))
        return result

    def noted_score(self: Scorer, *args: Any) -> Any:
        predictions = score(self, *args)
        maps.extend(weakref.ref(one.score_map) for one in predictions if one)
        alive.append((sum(ref() is not None for ref in pixels), sum(ref() is not None for ref in maps)))
        return predictions

    monkeypatch.setattr(batch_scorer, "_read", noted_read)
    monkeypatch.setattr(Scorer, "__call__", noted_score)
    results = on_cpu(batch_checkpoint)({"bytes": batch_contents * 4})
    assert len(results["score"]) == len(pixels) == len(maps) == 4 * IMAGES
    assert len(alive) == IMAGES
    assert max(images for images, _ in alive) <= 8
    assert max(score_maps for _, score_maps in alive) <= 8
