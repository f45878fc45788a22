"""Scoring on a real local Ray of two processors: the scores of one process, and nothing lost or repeated by a kill."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from fastmsflow.inference import BatchScorer
from tests.helpers.paths import ROOT
from tests.helpers.predictions import Command, rows

pytest.importorskip("ray.data", reason="needs Ray: pip install 'fastmsflow[ray]'")
ray_driver = pytest.importorskip("tests.helpers.ray_driver")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

pytestmark = pytest.mark.slow

# Everywhere in batches of 32: in others a score is rounded otherwise.
IMAGES, FOLDERS, BROKEN = 2560, 5, "3/0003.jpg"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # Ray's workers import the package too.
    "PYTHONPATH": str(ROOT),
    "RAY_USAGE_STATS_ENABLED": "0",
}
NUMBERS = ("score", "log_score", "absolute_score", "largest_region", "largest_region_left", "largest_region_bottom")


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,560 small JPEGs in folders, one of them broken."""
    root = tmp_path_factory.mktemp("jpegs")
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (64, 64, 3), np.uint8)
    for i in range(FOLDERS):
        (root / str(i)).mkdir()
    for i in range(IMAGES):
        own = np.roll(pixels, (i % 64, i // 64), (0, 1))[:40, : 36 + i % 5]
        Image.fromarray(own).save(root / f"{i % FOLDERS}/{i:04}.jpg", quality=80)
    (root / BROKEN).write_bytes(b"no image")
    return root


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def expected(jpegs: Path, checkpoint: Path) -> dict[str, dict[str, Any]]:
    """The row of each image by one process, by the image's name."""
    scorer, files = BatchScorer(checkpoint), [str(file) for file in sorted(jpegs.rglob("*.jpg"))]
    batches = [pa.table({"path": files[start : start + 32]}) for start in range(0, IMAGES, 32)]
    return by_name([row for batch in batches for row in scorer(batch).to_pylist()])


def by_name(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    named = {Path(row["path"]).name: row for row in found}
    assert len(named) == len(found), "an image has several rows"
    return named


def numbers(row: dict[str, Any]) -> list[float]:
    return [math.nan if row[name] is None else row[name] for name in NUMBERS]


def assert_same_scores(found: dict[str, dict[str, Any]], expected: dict[str, dict[str, Any]]) -> None:
    assert found.keys() == expected.keys()
    for name, row in expected.items():
        assert (found[name]["fault"] is None) == (row["fault"] is None), found[name]["fault"]
        if row["fault"] is None:
            assert numbers(found[name]) == pytest.approx(numbers(row), rel=1e-6, nan_ok=True)
            assert found[name]["defective"] == row["defective"]


class Head(NamedTuple):
    """A cluster of this machine, started from a shell."""

    address: str
    for_clients: str


@pytest.fixture(scope="module")
def head(python: Path) -> Iterator[Head]:
    ports = []
    with socket.socket() as one, socket.socket() as other:
        for free in (one, other):
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    # A folder of its own, where no other test's Ray finds this one; the sockets in it want a short name.
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        # Ray starts its workers by what it takes for its own Python.
        code = f"import sys; sys.executable = {str(python)!r}; from ray.scripts.scripts import main; main()"
        start = [sys.executable, "-c", code, "start", "--head", "--block"]
        options = f"--num-cpus=2 --port={ports[0]} --ray-client-server-port={ports[1]} --include-dashboard=false"
        process = subprocess.Popen(
            [*start, *options.split()],
            # The process that starts a server for each client forks while gRPC has threads; with gRPC's own handlers of
            # forks the child may end before it has become the server.
            env={**os.environ, **ENVIRONMENT, "RAY_TMPDIR": folder, "GRPC_ENABLE_FORK_SUPPORT": "0"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            wait_for(lambda: all(map(answers, ports)), process)
            yield Head(f"127.0.0.1:{ports[0]}", f"ray://127.0.0.1:{ports[1]}")
        finally:
            # Ended otherwise, it waits half a minute for its own processes.
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def is_whole(part: Path) -> bool:
    return part.read_bytes().endswith(b"PAR1")


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_killed_driver_loses_nothing_and_repeats_nothing_and_a_cluster_elsewhere_goes_on(
    head: Head,
    jpegs: Path,
    expected: dict[str, dict[str, Any]],
    checkpoint: Path,
    predict: Command,
    python: Path,
    tmp_path: Path,
) -> None:
    """SIGKILL behind the second file of results of a Ray of this machine. A cluster that is reached from outside by its
    address goes on with the folder at once, while the killed driver's workers may still write; one process then finds
    nothing left to do."""
    out = tmp_path / "out"
    options = (checkpoint, jpegs, "--out", out, "--format", "parquet", "--batch-size", 32, "--json")
    cluster = ("--images-per-part", 256, "--cluster")
    call = [python, "-m", "fastmsflow", "predict", *map(str, (*options, *cluster, "ray"))]
    driver = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: len(list(out.rglob("*.parquet"))) >= 2 and any(map(is_whole, out.rglob("*.parquet"))), driver)
    finally:
        driver.kill()
        driver.communicate()
    # A write may have been cut off where it was. A killed driver's worker may still be writing the other files.
    part = next(filter(is_whole, sorted(out.rglob("*.parquet"))))
    part.write_bytes(part.read_bytes()[:-50])
    # The killed workers may have left more files like it.
    before = times_of_all(filter(is_whole, out.rglob("*.parquet")))
    assert len(rows_of_all(out, set(before))) < IMAGES

    code, printed, err = predict(*options, *cluster, head.for_clients)
    # On a busy machine Ray may fail to start the client's server, or take too long, and does not try again by itself.
    for _ in range(3):
        if "the Ray cluster cannot be used" in err:
            code, printed, err = predict(*options, *cluster, head.for_clients)
    summary = json.loads(printed or "null")
    assert summary is not None, err
    assert (code, summary["images"], summary["faults"]) == (1, IMAGES, 1), err
    assert 0 < summary["scored_now"] <= IMAGES - len(rows_of_all(out, set(before)))
    # The fault and nothing else.
    assert BROKEN in err and len(err.splitlines()) == 1, err
    assert before.items() <= times_of_all(out.rglob("*.parquet")).items(), "finished files were written again"
    # As Spark reads a folder, which looks into no folders below, and Daft, which takes every file.
    assert {path.suffix for path in (out / "parts").iterdir()} == {".parquet"}
    assert_same_scores(by_name(rows_of_all(out)), expected)

    _, printed, _ = predict(*options, "--workers", 0)
    assert json.loads(printed)["scored_now"] == 0


@pytest.fixture(scope="module")
def driven(
    head: Head, jpegs: Path, noise_images: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """Returns what a user's own driver wrote and found: of tars, Parquet with bytes and files at once, then of decoded
    images; one of its workers is killed when some of the results are there."""
    import tarfile

    folder = tmp_path_factory.mktemp("driven")
    files = sorted(jpegs.rglob("*.jpg"))
    (folder / "tars").mkdir()
    for i in range(8):
        with tarfile.open(folder / f"tars/{i}.tar", "w") as tar:
            for file in files[i::8]:
                tar.add(file, file.name)
    (folder / "parquet").mkdir()
    for i in range(8):
        some = files[i::8]
        table = pa.table({"path": [file.name for file in some], "bytes": [file.read_bytes() for file in some]})
        pq.write_table(table, folder / f"parquet/{i}.parquet")
    sources = ray_driver.Sources(folder / "tars", folder / "parquet", jpegs / "0", noise_images)
    found = ray_driver.drive(head.address, checkpoint, sources, folder / "out")
    return folder / "out", found


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_killed_worker_loses_nothing_and_repeats_nothing(
    driven: tuple[Path, dict[str, Any]], expected: dict[str, dict[str, Any]]
) -> None:
    out, found = driven
    assert found["killed"], "no worker was killed before all was scored"
    named = {f"{name}.jpg": row for name, row in by_name(rows_in(out / "encoded", "")).items()}
    assert_same_scores(named, expected)


def test_bytes_in_parquet_have_the_scores_of_their_files(
    driven: tuple[Path, dict[str, Any]], expected: dict[str, dict[str, Any]]
) -> None:
    found = by_name([row for row in rows_in(driven[0] / "encoded", ".jpg") if "/" not in row["path"]])
    assert_same_scores(found, expected)
    assert found[Path(BROKEN).name]["fault"].startswith(f"{Path(BROKEN).name}: not an image")
    assert "bytes" not in found[Path(BROKEN).name]


def test_files_have_the_scores_of_one_process(
    driven: tuple[Path, dict[str, Any]], jpegs: Path, expected: dict[str, dict[str, Any]]
) -> None:
    found = by_name([row for row in rows_in(driven[0] / "encoded", ".jpg") if "/" in row["path"]])
    assert_same_scores(found, {file.name: expected[file.name] for file in (jpegs / "0").iterdir()})


def test_decoded_images_have_the_scores_of_predict(
    driven: tuple[Path, dict[str, Any]], noise_images: Path, checkpoint: Path, predict_parquet: Command, tmp_path: Path
) -> None:
    predict_parquet(checkpoint, noise_images, "--out", tmp_path, "--workers", 0)
    assert_same_scores(by_name(rows_of_all(driven[0] / "decoded")), by_name(rows(tmp_path)))


def test_an_empty_data_set_has_no_rows_and_bad_input_gives_its_line(driven: tuple[Path, dict[str, Any]]) -> None:
    told = driven[1]
    assert told["rows of no rows"] == 0
    assert "/nowhere/m.safetensors: no such file; give the path of a fastmsflow checkpoint" in told["no model"]
    assert "one of bytes, image and path must hold the images" in told["no column"]


def test_shards_are_read_by_the_cluster_and_a_damaged_one_is_tried_again(
    head: Head,
    checkpoint: Path,
    noise_images: Path,
    noise_shards_copy: Path,
    predict_parquet: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", head.address)
    whole = (noise_shards_copy / "000002.tar").read_bytes()
    (noise_shards_copy / "000002.tar").write_bytes(whole[:9000])
    options = (checkpoint, noise_shards_copy, "--out", tmp_path / "out", "--cluster", "ray", "--json")
    code, printed, err = predict_parquet(*options)
    summary = json.loads(printed)
    assert (code, summary["images"], summary["lost"]) == (1, 18, 3), err
    assert err.count("000002.tar: ") == 1
    (noise_shards_copy / "000002.tar").write_bytes(whole)
    code, printed, err = predict_parquet(*options)
    assert (code, json.loads(printed)["faults"]) == (0, 0), err
    assert predict_parquet(checkpoint, noise_images, "--out", tmp_path / "alone", "--workers", 0)[0] == 0
    assert_same_scores(by_name(rows_of_all(tmp_path / "out")), by_name(rows(tmp_path / "alone")))


def test_rows_in_a_folder_that_the_cluster_does_not_share_are_missed(
    checkpoint: Path, noise_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastmsflow import InputError
    from fastmsflow.inference.prediction_folder import PredictionFolder
    from fastmsflow.inference.prediction_sources import Files
    from fastmsflow.integrations import ray as ours

    monkeypatch.setattr(ours, "_score", lambda *args, **options: None)
    folder = PredictionFolder(str(tmp_path))
    folder.begin({}, on_cluster=True)
    line = "the cluster has scored 2 images, and 0 have rows here; give a folder that all its machines share"
    with pytest.raises(InputError, match=line):
        ours.score_on_ray(folder, Files(["a", "b"]), {}, ours.RayOptions(batch_size=8, images_per_part=8, gpus=0))


def test_the_json_stands_alone_on_standard_output_whatever_ray_prints(
    checkpoint: Path, noise_images: Path, predict_parquet: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warning = "(raylet) WARNING: 8 PYTHON worker processes have been started"

    @contextmanager
    def connected(cluster: str, quiet: bool) -> Iterator[int]:
        print(warning)
        yield 0

    monkeypatch.setattr("fastmsflow.cli.predict_parquet.connected", connected)
    monkeypatch.setattr("fastmsflow.cli.predict_parquet.score_on_ray", lambda *args: print(warning))
    options = (checkpoint, noise_images, "--out", tmp_path, "--cluster", "ray", "--json")
    code, printed, err = predict_parquet(*options)
    assert (code, json.loads(printed)["images"], err.count(warning)) == (0, 0, 2)


@pytest.mark.parametrize(
    ("cluster", "address", "left"),
    [
        ("ray://127.0.0.1:1", "", ""),
        ("ray://nowhere.invalid:10001", "", ""),
        ("ray", "127.0.0.1:1", ""),
        ("ray", "", "127.0.0.1:1"),
    ],
    ids=["address", "name", "RAY_ADDRESS", "left behind"],
)
def test_a_cluster_that_does_not_answer_is_named_at_once(
    cluster: str,
    address: str,
    left: str,
    checkpoint: Path,
    noise_images: Path,
    predict_parquet: Command,
    tmp_path: Path,
    monkeypatch,
) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text(left)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", address)
    begin = time.monotonic()
    code, _, err = predict_parquet(checkpoint, noise_images, "--out", tmp_path / "out", "--cluster", cluster)
    where = left or address or cluster
    assert (code, err.startswith(f"fastmsflow: {where}: no Ray cluster answers there (")) == (1, True), err
    assert len(err.splitlines()) == 1
    assert time.monotonic() - begin < 60
    assert not (tmp_path / "out").exists()


def test_ray_that_is_missing_is_named(
    checkpoint: Path, noise_images: Path, predict_parquet: Command, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray.data", None)
    code, _, err = predict_parquet(checkpoint, noise_images, "--out", tmp_path / "out", "--cluster", "ray")
    assert (code, err) == (1, "fastmsflow: a cluster needs Ray: pip install 'fastmsflow[ray]'")


def wait_for(condition: Any, process: "subprocess.Popen[Any] | None" = None, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def rows_in(folder: Path, suffix: str) -> list[dict[str, Any]]:
    """The rows of images whose names end so; images in tars have names without a suffix."""
    return [row for row in rows_of_all(folder) if Path(row["path"]).suffix == suffix]


def rows_of_all(out: Path, names: set[str] | None = None) -> list[dict[str, Any]]:
    paths = sorted(out.rglob("*.parquet"))
    return [row for path in paths if names is None or path.name in names for row in pq.read_table(path).to_pylist()]


def times_of_all(paths: Iterable[Path]) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in paths}
