"""BatchScorer: the same scores as `predict`, one load, threads and copies, and one line for everything it refuses."""

import copy
import csv
import json
import multiprocessing
import os
import pickle
import shutil
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
from batches_scored import (
    BOX,
    IMAGES,
    RESULTS,
    SCORES,
    SIZE,
    arrays,
    assert_same,
    contents,
    expected,
    images,
    model,
    network,
    scorer,
)
from tolerances import OTHER_BATCH
from web_servers import send, web_server

from fastmsflow import InputError, MSFlow
from fastmsflow.data import load_image
from fastmsflow.errors import UnavailableError
from fastmsflow.inference import BatchScorer, batch_scorer
from fastmsflow.inference.scorer import Scorer


def on_cpu(model: object, **options: Any) -> BatchScorer:
    return BatchScorer(model, **{"dtype": "float32", "device": "cpu", **options})  # type: ignore[arg-type]


# The same as predict's


@pytest.mark.parametrize("size", [1, 5, IMAGES])
def test_scores_labels_and_regions_are_those_of_predict(
    size: int, model: Path, images: list[Path], scorer: BatchScorer, predict: Callable[..., Any], tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = []
    for start in range(0, IMAGES, size):
        results = scorer({"path": [str(path) for path in images[start : start + size]]})
        assert list(results["fault"]) == [None] * len(results["fault"])
        names = {name: column.tolist() for name, column in results.items() if name != "path"}
        rows += [dict(zip(names, row, strict=True)) for row in zip(*names.values(), strict=True)]
    assert 0 < sum(row["defective"] for row in rows) < IMAGES
    assert 0 < sum(row["largest_region"] > 0 for row in rows) < IMAGES
    options = ("--batch-size", size, "--dtype", "float32", "--no-heat-maps", "--workers", 0, "--quiet")
    for form in ("csv", "jsonl"):
        assert predict(model, images[0].parent, "--out", tmp_path, "--format", form, *options)[0] == 0
    with (tmp_path / "scores.csv").open(newline="") as file:
        as_csv = {row["image"]: row for row in csv.DictReader(file)}
    as_lines = {row["image"]: row for row in map(json.loads, (tmp_path / "scores.jsonl").read_text().splitlines())}
    for path, row in zip(map(str, images), rows, strict=True):
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
    scorer: BatchScorer, contents: list[bytes], expected: dict[str, Any]
) -> None:
    for size in (1, 5):
        parts = [scorer({"bytes": contents[start : start + size]}) for start in range(0, IMAGES, size)]
        for name in SCORES:
            found = np.concatenate([part[name] for part in parts])
            np.testing.assert_allclose(found, expected[name], rtol=OTHER_BATCH, atol=0)


def test_labels_are_by_the_threshold_that_was_given(
    model: Path, contents: list[bytes], expected: dict[str, Any]
) -> None:
    limit = float(np.sort(expected["absolute_score"])[-3])
    results = on_cpu(model, threshold=limit)({"bytes": contents})
    assert results["defective"].tolist() == (expected["absolute_score"] > limit).tolist()
    assert sum(results["defective"]) == 2
    np.testing.assert_array_equal(results["largest_region"], expected["largest_region"])


def test_labels_and_regions_are_by_the_rate_of_false_alarms(network: MSFlow, contents: list[bytes]) -> None:
    calibrated, low, high = copy.deepcopy(network), -1e9, 1e9
    assert calibrated.calibration is not None
    held_out = (*(low,) * 10, *(high,) * 10)
    object.__setattr__(calibrated.calibration, "scores", held_out)
    object.__setattr__(calibrated.calibration, "peaks", held_out)
    for rate, defective, whole in ((0.1, False, False), (0.9, True, True)):
        results = on_cpu(calibrated, false_alarms=rate)({"bytes": contents[:4]})
        assert results["defective"].tolist() == [defective] * 4
        assert (results["largest_region"] > 0).tolist() == [whole] * 4
    with pytest.raises(InputError, match="needs 999 held-out good images, and there are 20"):
        on_cpu(calibrated, false_alarms=0.001).load()


def test_a_model_without_calibration_leaves_labels_and_regions_null(
    network: MSFlow, contents: list[bytes], expected: dict[str, Any]
) -> None:
    plain = copy.deepcopy(network)
    plain.calibration = None
    results = on_cpu(plain)({"bytes": contents})
    assert results["defective"].tolist() == [None] * IMAGES
    assert all(np.isnan(results[name]).all() for name in ("largest_region", *BOX))
    np.testing.assert_array_equal(results["score"], expected["score"])
    given = on_cpu(plain, threshold=-1e9)({"bytes": contents})
    assert given["defective"].tolist() == [True] * IMAGES
    with pytest.raises(InputError, match="this model is not calibrated"):
        on_cpu(plain, false_alarms=0.1).load()


def test_maps_are_the_absolute_maps_of_the_model(network: MSFlow, model: Path, images: list[Path]) -> None:
    paths = [*map(str, images[:2]), "none.png", str(images[2])]
    maps = on_cpu(model, maps=True)({"path": paths})["score_map"]
    assert (maps.shape, maps.dtype) == ((4, *SIZE), np.float32)
    assert np.isnan(maps[2]).all()
    ready = network.for_inference()
    with torch.no_grad():
        of_model = ready.scores(torch.stack([load_image(path, SIZE) for path in images[:3]])).absolute_map
    np.testing.assert_array_equal(maps[[0, 1, 3]], of_model.numpy())


def test_a_score_that_is_not_finite_is_a_fault(network: MSFlow, images: list[Path]) -> None:
    broken = copy.deepcopy(network)
    with torch.no_grad():
        next(iter(broken.flow.parameters())).fill_(torch.nan)
    results = on_cpu(broken)({"path": [str(images[0])]})
    assert np.isnan(results["score"][0])
    assert results["defective"][0] is None
    assert results["fault"][0].startswith(f"{images[0]}: its score is not finite")


# Copies, threads, processes


@pytest.mark.parametrize("how", ["pickle", "cloudpickle", "copy"])
@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("given", ["path", "model"])
def test_a_copy_scores_the_same(
    how: str, loaded: bool, given: str, model: Path, network: MSFlow, contents: list[bytes], expected: dict[str, Any]
) -> None:
    original = on_cpu(network if given == "model" else model, threshold=0.5, maps=True)
    if loaded:
        original.load()
    if how == "copy":
        twin = copy.deepcopy(original)
    else:
        pickler = pytest.importorskip(how)
        content = pickler.dumps(original)
        assert given == "model" or len(content) < 1000
        twin = pickle.loads(content)
    results = twin({"bytes": contents})
    np.testing.assert_array_equal(results["score"], expected["score"])
    assert results["defective"].tolist() == (expected["absolute_score"] > 0.5).tolist()
    assert results["score_map"].shape == (IMAGES, *SIZE)


def test_it_loads_once_however_many_threads_begin(
    model: Path, contents: list[bytes], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    load, loads, together = MSFlow.load, [], threading.Barrier(8)

    def slow(path: Any) -> MSFlow:
        loads.append(path)
        time.sleep(0.1)
        return load(path)

    monkeypatch.setattr(MSFlow, "load", slow)
    scorer = on_cpu(model)
    assert loads == []

    def score(_: int) -> Any:
        together.wait()
        return scorer({"bytes": contents})

    with ThreadPoolExecutor(8) as threads:
        for results in threads.map(score, range(8)):
            assert_same(results, expected)
    assert loads == [str(model)]


def test_threads_get_the_results_of_their_own_batches(scorer: BatchScorer, contents: list[bytes]) -> None:
    damaged = contents[0][:-200]
    batches = [{"bytes": [*contents[i:], damaged, *contents[:i]][: i + 3]} for i in range(8)] * 2
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
    scorer: BatchScorer, contents: list[bytes], expected: dict[str, Any]
) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=lambda: theirs.send(scorer({"bytes": contents})), daemon=True)
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
    model: Path, contents: list[bytes], monkeypatch: pytest.MonkeyPatch
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
        judged = score(self, *args)
        maps.extend(weakref.ref(one.score_map) for one in judged if one)
        alive.append((sum(ref() is not None for ref in pixels), sum(ref() is not None for ref in maps)))
        return judged

    monkeypatch.setattr(batch_scorer, "_read", noted_read)
    monkeypatch.setattr(Scorer, "__call__", noted_score)
    results = on_cpu(model)({"bytes": contents * 4})
    assert len(results["score"]) == len(pixels) == len(maps) == 4 * IMAGES
    assert len(alive) == IMAGES
    assert max(images for images, _ in alive) <= 8
    assert max(kept for _, kept in alive) <= 8


# Models


def test_a_model_that_is_given_stays_as_it_is(network: MSFlow, contents: list[bytes], expected: dict[str, Any]) -> None:
    given = copy.deepcopy(network).train()
    state = copy.deepcopy(given.state_dict())
    trained = [parameter.requires_grad for parameter in given.parameters()]
    results = on_cpu(given)({"bytes": contents})
    assert_same(results, expected)
    assert given.training
    assert [parameter.requires_grad for parameter in given.parameters()] == trained
    for name, tensor in given.state_dict().items():
        assert torch.equal(tensor, state[name])
        assert (tensor.device, tensor.dtype, tensor.stride()) == (
            state[name].device, state[name].dtype, state[name].stride())  # fmt: skip


@pytest.mark.parametrize("where", ["folder", "memory", "file", "http", "later"])
def test_a_model_comes_from_wherever_it_is(
    where: str, model: Path, network: MSFlow, contents: list[bytes], expected: dict[str, Any], tmp_path: Path
) -> None:
    if where == "http":
        pytest.importorskip("aiohttp", reason="needs aiohttp")
        with web_server(lambda request: send(request, model.read_bytes())) as server:
            assert_same(on_cpu(f"{server}/model.safetensors")({"bytes": contents}), expected)
        return
    place: str | Path = tmp_path / "model"
    if where == "folder":
        network.save_pretrained(place)
    elif where == "memory":
        place = "memory://models/a.safetensors"
        pytest.importorskip("fsspec").filesystem("memory").pipe(place, model.read_bytes())
    elif where == "file":
        pytest.importorskip("fsspec")
        place = f"file://{model}"
    scorer = on_cpu(place)
    if where == "later":
        for _ in range(2):
            with pytest.raises(InputError, match=r"/model: no such file; give the path of a fastmsflow checkpoint"):
                scorer({"bytes": contents})
        shutil.copy(model, place)
    assert_same(scorer({"bytes": contents}), expected)


REFUSED_AT_ONCE = [
    ({"threshold": float("inf")}, "the threshold is inf; give a number of nats"),
    ({"threshold": float("nan")}, "the threshold is nan; give a number of nats"),
    ({"false_alarms": 0.0}, "the false-alarm rate is 0.0; it is a share of the good images, e.g. 0.05"),
    ({"false_alarms": 1.5}, "the false-alarm rate is 1.5; it is a share of the good images, e.g. 0.05"),
    ({"dtype": "int8"}, "dtype int8: give float32, float16 or auto"),
    ({"dtype": torch.float32}, "dtype torch.float32: give float32, float16 or auto"),
    ({"engine": "onnx"}, "engine 'onnx' is not known; there is torch"),
    ({"tile": 512}, "tile 512: images are scored whole, resized to the model's size; leave tile out"),
    *(
        ({"device": device}, f"device {device!r} is not known; give auto, cpu, cuda or cuda:N")
        for device in ("gpu", "", "mps", "meta", "cuda:x", "cuda:-1", None)
    ),
]


@pytest.mark.parametrize(("options", "line"), REFUSED_AT_ONCE, ids=str)
def test_an_argument_that_cannot_be_had_is_refused_before_anything_is_loaded(
    options: dict[str, Any], line: str
) -> None:
    with pytest.raises(InputError) as refused:
        BatchScorer("nowhere.safetensors", **options)
    assert str(refused.value) == line


@pytest.mark.parametrize(
    ("content", "line"),
    [(b"", "not a whole safetensors file"), (b"no model" * 99, "not a whole safetensors file"), (None, "no such file")],
)
@pytest.mark.parametrize("scheme", ["", "memory://", "http://"])
def test_what_is_no_model_is_told_in_one_line_that_names_it(
    content: bytes | None, line: str, scheme: str, tmp_path: Path
) -> None:
    def answer(request: Any) -> None:
        send(request, content or b"", 404 if content is None else 200)

    if scheme:
        pytest.importorskip("aiohttp" if scheme == "http://" else "fsspec")
    with web_server(answer) as server:
        place = f"{server}/model" if scheme == "http://" else f"{scheme}{tmp_path}/model"
        if content is not None and scheme == "memory://":
            pytest.importorskip("fsspec").filesystem("memory").pipe(place, content)
        elif content is not None and not scheme:
            Path(place).write_bytes(content)
        with pytest.raises(InputError) as refused:
            on_cpu(place).load()
    assert str(refused.value).startswith(f"{place}: {line}")
    assert "\n" not in str(refused.value)


def test_a_server_without_its_model_is_told_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp", reason="needs aiohttp")
    monkeypatch.setattr("fastmsflow.data.url_images.TIMEOUT", 0.3)
    ended = threading.Event()
    with web_server(lambda request: ended.wait(60)) as server:
        begin = time.monotonic()
        with pytest.raises(InputError, match=r"^http://.*/m: no answer within 0.3 s"):
            on_cpu(f"{server}/m").load()
        assert time.monotonic() - begin < 30
        ended.set()


def test_a_model_that_lacks_something_is_named_by_its_url(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").pipe("memory://models/b", model.read_bytes())

    def lacking(path: Path) -> MSFlow:
        raise UnavailableError(f"{path}: does not hold its extractor's weights")

    monkeypatch.setattr(MSFlow, "load", lacking)
    with pytest.raises(UnavailableError, match=r"^memory://models/b: does not hold its extractor's weights$"):
        on_cpu("memory://models/b").load()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_named(device: str, model: Path) -> None:
    with pytest.raises(InputError, match=rf"^device {device}: this process sees 0 GPUs; give auto or cpu$"):
        BatchScorer(model, device=device).load()


def test_auto_is_float32_without_a_gpu(model: Path, contents: list[bytes], expected: dict[str, Any]) -> None:
    assert set(expected) == RESULTS
    if not torch.cuda.is_available():
        assert_same(BatchScorer(model)({"bytes": contents}), expected)
