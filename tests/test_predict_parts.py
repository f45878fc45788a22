"""``fastmsflow predict --format parquet``: parts written once, by several processes, and nothing lost on the way."""

import csv
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from disks import small_disk
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from fastmsflow import MSFlow
from fastmsflow.__main__ import main as run_main
from fastmsflow.calibration import Calibration
from fastmsflow.cli.common import Bar, Rate
from fastmsflow.cli.launch import _worst
from fastmsflow.data import load_image, write_shards
from fastmsflow.data.shard_set import is_shard_set
from fastmsflow.files import claimed_folder

pq = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow: pip install 'fastmsflow[shards]'")
pytest.importorskip("webdataset", reason="needs webdataset: pip install 'fastmsflow[shards]'")

from fastmsflow.report.parquet import Table  # noqa: E402 - needs pyarrow
from fastmsflow.report.parts import Run  # noqa: E402

ROOT = Path(__file__).parents[1]
IMAGES, PER_PART = 18, 4
SIZES = [4, 4, 4, 4, 2]
SCORES = ("score", "log_score", "absolute_score")
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch, capsys) -> Command:
    """Runs ``fastmsflow predict ARGS --format parquet`` in this process -> (exit code, stdout, stderr)."""

    def run(*args: object, stdin: bytes = b"", form: str = "parquet") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastmsflow", "predict", *map(str, args), "--format", form])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as end:
            run_main()
        out, err = capsys.readouterr()
        message = end.value.code if isinstance(end.value.code, str) else ""
        return 1 if message else int(end.value.code or 0), out, err + message

    return run


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for i in range(IMAGES):
        Image.fromarray(random.integers(0, 256, (40, 36, 3), np.uint8)).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def written(images: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "set"
    write_shards(sorted(images.iterdir()), out, PER_PART)
    return out


@pytest.fixture
def shards(written: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(written, tmp_path / "set"))


@pytest.fixture(scope="module")
def network(images: Path) -> MSFlow:
    """Untrained, and calibrated so that half of the images are defective, and each has a region."""
    torch.manual_seed(0)
    model = MSFlow("test_efficientnet", pretrained=False, image_size=(32, 32), blocks=(1, 1, 1)).eval()
    with torch.no_grad():
        scores = model.scores(torch.stack([load_image(p, (32, 32)) for p in sorted(images.iterdir())]))
    middle = float(scores.absolute_score.sort().values[IMAGES // 2 - 1 : IMAGES // 2 + 1].mean())
    peaks, pixels = scores.absolute_map.flatten(1).amax(dim=1), scores.absolute_map.flatten()
    model.calibration = Calibration((middle,) * 20, (0.9 * float(peaks.min()),) * 20, float(pixels.median()))
    return model


@pytest.fixture(scope="module")
def model(network: MSFlow, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "calibrated.safetensors"
    network.save(path)
    return path


def table(part: Path) -> Any:
    # Not by its name: that would be open until the garbage collector comes, and a disk cannot be taken away.
    return pq.read_table(io.BytesIO(part.read_bytes()))


def rows(out: Path) -> list[dict[str, Any]]:
    """Of all parts, in their order."""
    return [row for path in sorted(out.glob("parts/part-*.parquet")) for row in table(path).to_pylist()]


def manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / "manifest.json").read_text())


def times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("parts/part-*.parquet")}


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


# What is written


@pytest.mark.parametrize("workers", [0, 2])
def test_the_rows_of_files_are_those_of_the_csv_in_the_order_of_the_images(
    workers: int, model: Path, images: Path, command: Command, tmp_path: Path
) -> None:
    of_parts = (model, images, "--out", tmp_path / "parts", "--images-per-part", PER_PART, "--workers", workers)
    code, _, err = command(*of_parts, "--batch-size", 4)
    assert (code, err) == (0, "")
    command(model, images, "--out", tmp_path / "csv", "--batch-size", 4, "--no-heat-maps", form="csv")
    with (tmp_path / "csv/scores.csv").open(newline="") as file:
        expected = {row["image"]: row for row in csv.DictReader(file)}

    found = rows(tmp_path / "parts")
    assert [
        pq.read_metadata(path).num_rows for path in sorted((tmp_path / "parts").glob("parts/part-*.parquet"))
    ] == SIZES
    assert [row["image"] for row in found] == sorted(map(str, images.iterdir()))
    assert [row["index"] for row in found] == list(range(IMAGES))
    for row in found:
        of_csv = expected[row["image"]]
        assert [row[name] for name in SCORES] == [float(of_csv[name]) for name in SCORES]
        assert (row["label"], row["threshold"]) == (of_csv["label"], float(of_csv["threshold"]))
        assert len(row["regions"]) == int(of_csv["regions"]) >= 1
        assert row["regions"][0]["area"] == int(of_csv["largest_region"])
        assert 0 <= row["regions"][0]["left"] < row["regions"][0]["right"] <= 36
        assert row["fault"] is None
    assert {row["label"] for row in found} == {"good", "defective"}


def test_each_shard_is_a_part_of_the_same_rows_as_its_files(
    model: Path, images: Path, written: Path, command: Command, tmp_path: Path
) -> None:
    command(model, images, "--out", tmp_path / "files", "--images-per-part", PER_PART, "--workers", 0)
    code, _, err = command(model, written, "--out", tmp_path / "shards", "--workers", 2)
    assert (code, err) == (0, "")
    of_files = [{**row, "image": Path(row["image"]).name} for row in rows(tmp_path / "files")]
    assert rows(tmp_path / "shards") == of_files


@pytest.mark.parametrize("kind", ["manifest", "file://", "pipe:"])
def test_shards_are_read_wherever_they_lie(
    kind: str, model: Path, written: Path, command: Command, tmp_path: Path
) -> None:
    where = {
        "manifest": f"{written}/manifest.json",
        "file://": f"file://{written}",
        "pipe:": f"pipe:cat {written}/{{}}",
    }
    assert command(model, where[kind], "--out", tmp_path, "--workers", 0)[0] == 0
    assert [row["index"] for row in rows(tmp_path)] == list(range(IMAGES))


def test_only_shards_are_taken_for_shards(written: Path, images: Path, tmp_path: Path) -> None:
    assert is_shard_set("s3://bucket/set")
    assert is_shard_set("pipe:cat {}")
    assert is_shard_set(str(written))
    (tmp_path / "manifest.json").write_text('{"format": "another"}')
    assert not any(map(is_shard_set, [str(images), str(images / "00.png"), "*.png", "-", str(tmp_path)]))
    (tmp_path / "manifest.json").write_text("[")
    assert not is_shard_set(str(tmp_path))


def test_the_parts_read_as_one_table(model: Path, written: Path, command: Command, tmp_path: Path) -> None:
    dataset = pytest.importorskip("pyarrow.dataset")
    pandas = pytest.importorskip("pandas")
    command(model, written, "--out", tmp_path, "--workers", 0)
    table = dataset.dataset(tmp_path / "parts", format="parquet").to_table()
    assert table.num_rows == IMAGES
    frame = pandas.read_parquet(tmp_path / "parts").sort_values("index")
    assert frame["image"].tolist() == [f"{i:02}.png" for i in range(IMAGES)]
    assert ((frame["absolute_score"] > frame["threshold"]) == (frame["label"] == "defective")).all()


def test_the_manifest_has_totals_and_checksums_and_the_summary_is_json(
    model: Path, written: Path, command: Command, tmp_path: Path
) -> None:
    code, out, _ = command(model, written, "--out", tmp_path, "--workers", 0, "--json")
    summary, whole = json.loads(out), manifest(tmp_path)
    assert code == 0
    assert (summary["images"], summary["good"], summary["defective"], summary["faults"]) == (IMAGES, 9, 9, 0)
    assert [part["rows"] for part in whole["parts"]] == SIZES
    assert (whole["images"], whole["defective"], whole["damaged"]) == (IMAGES, 9, [])
    assert {part["name"] for part in whole["parts"]} == set(times(tmp_path))
    for part in whole["parts"]:
        content = (tmp_path / "parts" / part["name"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (part["bytes"], part["sha256"])
    assert json.loads((tmp_path / "predictions.json").read_text())["key"] == whole["key"]


def test_without_a_threshold_there_are_no_labels(
    network: MSFlow, images: Path, command: Command, tmp_path: Path
) -> None:
    calibration, network.calibration = network.calibration, None
    network.save(tmp_path / "m.safetensors")
    network.calibration = calibration
    code, out, _ = command(tmp_path / "m.safetensors", images, "--out", tmp_path / "out", "--workers", 0)
    assert (code, "no labels" in out) == (0, True)
    assert {(row["label"], row["threshold"], row["regions"]) for row in rows(tmp_path / "out")} == {(None, None, None)}


# Faults


def test_an_image_that_cannot_be_read_is_a_row_with_its_fault(
    model: Path, images: Path, command: Command, tmp_path: Path
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(images, folder)
    (folder / "05.png").write_bytes((images / "05.png").read_bytes()[:500])
    (folder / os.fsdecode(b"05 \xff.png")).write_bytes(b"")
    code, _, err = command(model, folder, tmp_path / "none*.png", "--out", out, "--images-per-part", 5, "--workers", 0)
    assert code == 1
    assert "skipped 2 images that cannot be read or scored; their rows have the fault" in err
    assert "none*.png: no file matches this pattern" in err
    found = rows(out)
    assert [row["index"] for row in found] == list(range(IMAGES + 1))
    bad = [row for row in found if row["fault"]]
    assert [row["image"] for row in bad] == [f"{folder}/05 \\xff.png", f"{folder}/05.png"]
    assert "empty (0 bytes)" in bad[0]["fault"]
    assert "damaged or truncated" in bad[1]["fault"]
    assert all(row[name] is None for row in bad for name in (*SCORES, "label", "regions"))
    assert (manifest(out)["faults"], manifest(out)["damaged"]) == (2, [])

    before = times(out)
    assert command(model, folder, "--out", out, "--images-per-part", 5, "--workers", 0)[0] == 1
    assert times(out) == before, "an image that cannot be read is tried again"


def test_a_score_that_is_not_finite_is_a_fault(network: MSFlow, images: Path, command: Command, tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with torch.no_grad():
        network.flow.fusion_flow.load_state_dict(
            {
                k: v * float("nan") if v.is_floating_point() else v
                for k, v in network.flow.fusion_flow.state_dict().items()
            }
        )
    network.save(tmp_path / "m.safetensors")
    network.load_state_dict(state)
    code, _, _ = command(tmp_path / "m.safetensors", images / "00.png", "--out", tmp_path / "out", "--workers", 0)
    (row,) = rows(tmp_path / "out")
    assert (code, row["score"], "00.png: its score is not finite" in row["fault"]) == (1, None, True)


def cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:9000])


def padded(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes() + bytes(512))


@pytest.mark.parametrize(
    ("damage", "lost"), [(cut, 3), (padded, 0), (Path.unlink, 4)], ids=["cut", "padded", "missing"]
)
def test_a_damaged_shard_is_named_and_tried_again_when_it_is_mended(
    damage: Callable[[Path], None], lost: int, model: Path, shards: Path, command: Command, tmp_path: Path
) -> None:
    out, shard = tmp_path / "out", shards / "000002.tar"
    whole = shard.read_bytes()
    damage(shard)
    code, _, err = command(model, shards, "--out", out, "--workers", 0, "--batch-size", 2)
    assert code == 1
    assert err.startswith(f"skipped {lost} images: {shard}: ")
    assert len(err.splitlines()) == 1
    found = rows(out)
    assert [row["index"] for row in found] == list(range(IMAGES))
    gone = [row["index"] for row in found if row["score"] is None]
    assert gone == list(range(12 - lost, 12))
    assert all(str(shard) in found[i]["fault"] and found[i]["image"] is None for i in gone)
    assert (manifest(out)["lost"], manifest(out)["damaged"]) == (lost, ["part-000002.parquet"])

    before = times(out)
    shard.write_bytes(whole)
    assert command(model, shards, "--out", out, "--workers", 0, "--batch-size", 2)[0] == 0
    changed = {name for name, time in times(out).items() if time != before[name]}
    assert changed == {"part-000002.parquet"}
    assert (manifest(out)["faults"], manifest(out)["damaged"]) == (0, [])
    assert all(row["score"] is not None for row in rows(out))


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_full_disk_is_named_and_finished_parts_stay(
    model: Path, written: Path, command: Command, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", "32k") as disk:
        code, _, err = command(model, written, "--out", disk / "out", "--workers", 0)
        assert code == 1
        assert err.endswith("cannot be written, the disk is full; free some space or choose another folder")
        assert len(err.splitlines()) == 1
        assert 1 <= len(times(disk / "out")) < len(SIZES)
        assert len(rows(disk / "out")) == PER_PART * len(times(disk / "out"))
        assert not list((disk / "out").rglob(".*"))


# Going on


KILLED = """\
import os, signal
from pathlib import Path
from fastmsflow.__main__ import main

replace = Path.replace

def killed(aside, target):
    if "000002" in str(target):
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(aside, target)

Path.replace = killed
main()
"""


def test_a_killed_run_goes_on_behind_its_finished_parts_and_ends_in_the_same_bytes(
    model: Path, written: Path, command: Command, tmp_path: Path
) -> None:
    out, options = tmp_path / "out", (model, written, "--workers", 0)
    args = [sys.executable, "-c", KILLED, "predict", *map(str, options), "--out", str(out), "--format", "parquet"]
    killed = subprocess.run(args, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert killed.returncode == -9, killed.stderr
    before = times(out)
    assert sorted(before) == ["part-000000.parquet", "part-000001.parquet"]
    assert list(out.glob("parts/.*aside*")), "nothing half-written to be cleaned up"
    assert not (out / "manifest.json").exists()

    assert command(*options, "--out", out)[0] == 0
    assert before.items() <= times(out).items()
    command(*options, "--out", tmp_path / "at once")
    assert contents(out) == contents(tmp_path / "at once")

    before = times(out)
    code, printed, _ = command(*options, "--out", out)
    assert (code, "all were there already" in printed, times(out)) == (0, True, before)


def test_an_interruption_keeps_finished_parts_and_says_how_to_go_on(
    model: Path, written: Path, command: Command, tmp_path: Path, monkeypatch
) -> None:
    write = Table.write

    def interrupted(table: Table, path: Path, *args: Any) -> None:
        if "000002" in path.name:
            raise KeyboardInterrupt
        write(table, path, *args)

    monkeypatch.setattr(Table, "write", interrupted)
    code, _, err = command(model, written, "--out", tmp_path, "--workers", 0)
    assert code == 130
    assert err.strip() == (
        f"interrupted: 2 of 5 parts are finished in {tmp_path}; the same command goes on behind them"
    )
    assert set(contents(tmp_path)) == {"part-000000.parquet", "part-000001.parquet", "predictions.json"}


def test_a_part_that_is_not_whole_is_done_again(model: Path, written: Path, command: Command, tmp_path: Path) -> None:
    command(model, written, "--out", tmp_path, "--workers", 0)
    before, part = contents(tmp_path), tmp_path / "parts/part-000001.parquet"
    part.write_bytes(part.read_bytes()[:-100])
    assert command(model, written, "--out", tmp_path, "--workers", 0)[0] == 0
    assert contents(tmp_path) == before


@pytest.mark.parametrize("other", ["model", "threshold", "images", "images per part"])
def test_what_another_run_left_is_not_mixed_with_this_one(
    other: str, network: MSFlow, model: Path, images: Path, command: Command, tmp_path: Path
) -> None:
    out, named = tmp_path / "out", sorted(images.iterdir())
    command(model, *named, "--out", out, "--workers", 0, "--images-per-part", PER_PART, "--threshold", 0.5)
    before = contents(out)
    options = {"--images-per-part": PER_PART, "--threshold": 0.5}
    if other == "model":
        bias = next(network.flow.parameters()).data
        bias += 1
        model = tmp_path / "m.safetensors"
        network.save(model)
        bias -= 1
    elif other == "threshold":
        options["--threshold"] = 0.25
    elif other == "images":
        named = [*named[1:], named[0]]
    else:
        options["--images-per-part"] = 5
    given = [text for option in options.items() for text in option]
    code, _, err = command(model, *named, "--out", out, "--workers", 0, *given)
    assert code == 1
    change = {
        "model": r"model was [0-9a-f]{16}, is [0-9a-f]{16}",
        "threshold": "threshold was 0.5, is 0.25",
        "images": "source was files [0-9a-f]{16}, is files [0-9a-f]{16}",
        "images per part": "images per part was 4, is 5",
    }[other]
    line = rf"fastmsflow: {out}: holds results of another run \({change}\); set that back, or choose another folder"
    assert re.fullmatch(line, err), err
    assert contents(out) == before


def test_a_model_is_known_by_what_it_holds_not_by_its_name(
    model: Path, written: Path, command: Command, tmp_path: Path
) -> None:
    command(model, written, "--out", tmp_path / "out", "--workers", 0)
    shutil.copy(model, tmp_path / "moved.safetensors")
    before = times(tmp_path / "out")
    assert command(tmp_path / "moved.safetensors", written, "--out", tmp_path / "out", "--workers", 0)[0] == 0
    assert times(tmp_path / "out") == before


def test_a_folder_of_something_else_is_left_as_it_is(
    model: Path, images: Path, shards: Path, command: Command, tmp_path: Path
) -> None:
    before = contents(shards)
    code, _, err = command(model, shards, "--out", shards, "--workers", 0)
    assert (code, "holds a predictions.json or manifest.json of something else" in err) == (1, True)
    assert contents(shards) == before
    command(model, shards, "--out", tmp_path / "out", "--workers", 0)
    (tmp_path / "out/predictions.json").unlink()
    (tmp_path / "out/manifest.json").unlink()
    before = contents(tmp_path / "out")
    code, _, err = command(model, shards, "--out", tmp_path / "out", "--workers", 0)
    assert (code, "holds parts, and no predictions.json that says of what" in err) == (1, True)
    assert contents(tmp_path / "out") == before


# Several processes


def test_two_processes_share_out_the_parts_of_one_list(
    model: Path, images: Path, command: Command, tmp_path: Path
) -> None:
    """By the command line itself; of names on standard input, which one process alone can read."""
    (tmp_path / "bad.png").write_bytes(b"")
    names = [*sorted(images.iterdir()), tmp_path / "bad.png"]
    listed = b"".join(os.fsencode(name) + b"\0" for name in names)
    options = (model, "-", "--null", "--images-per-part", PER_PART, "--format", "parquet", "--json")
    args = [sys.executable, "-m", "fastmsflow", "predict", *map(str, options), "--devices", "2", "--workers", "1"]
    both = subprocess.run(
        [*args, "--out", str(tmp_path / "two")],
        input=listed,
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert both.returncode == 1, both.stderr
    assert both.stderr.decode().strip() == ("skipped 1 images that cannot be read or scored; their rows have the fault")
    summary = json.loads(both.stdout)
    assert (summary["images"], summary["faults"], summary["scored_now"]) == (IMAGES + 1, 1, IMAGES + 1)

    command(
        model, "-", "--null", "--images-per-part", PER_PART, "--workers", 0, "--out", tmp_path / "one", stdin=listed
    )
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.parametrize(("codes", "expected"), [([-15, 1], 1), ([-9, -15], 137), ([-15], 143), ([130, 130], 130)])
def test_the_launcher_ends_as_the_process_that_failed_not_as_those_it_ended(codes: list[int], expected: int) -> None:
    assert _worst(codes) == expected


def test_only_parts_that_are_missing_are_scored(
    model: Path, written: Path, command: Command, tmp_path: Path, monkeypatch
) -> None:
    scored, score = [], Run.score

    def recorded(run: Run, scorer: Any, parts: list[int], *args: Any) -> None:
        scored.append(parts)
        score(run, scorer, parts, *args)

    monkeypatch.setattr(Run, "score", recorded)
    command(model, written, "--out", tmp_path, "--workers", 0)
    for part in (1, 2, 4):
        (tmp_path / f"parts/part-{part:06}.parquet").unlink()
    command(model, written, "--out", tmp_path, "--workers", 0)
    assert scored == [[0, 1, 2, 3, 4], [1, 2, 4]]


def test_two_commands_do_not_share_a_folder(model: Path, written: Path, command: Command, tmp_path: Path) -> None:
    with claimed_folder(tmp_path / "out"):
        code, _, err = command(model, written, "--out", tmp_path / "out", "--workers", 0)
    assert (code, "another process is writing there" in err) == (1, True)


# The command line


def test_options_of_parts_without_parts_are_refused(
    model: Path, images: Path, written: Path, command: Command, tmp_path: Path
) -> None:
    for extra in (("--workers", 1), ("--images-per-part", 5), ("--devices", 2)):
        code, _, err = command(model, images, "--out", tmp_path / "out", *extra, form="csv")
        assert (code, "scored in parts alone; give --format parquet" in err) == (1, True), extra
    code, _, err = command(model, written, "--out", tmp_path / "out", form="jsonl")
    assert (code, err) == (1, f"fastmsflow: {written}: scored in parts alone; give --format parquet")
    code, _, err = command(model, images, "--out", tmp_path / "out", "--heat-maps")
    assert (code, "--format parquet writes none" in err) == (1, True)
    code, _, err = command(model, written, images, "--out", tmp_path / "out")
    assert (code, "a set of shards is scored alone" in err) == (1, True)
    code, _, err = command(model, written, "--out", tmp_path / "out", "--images-per-part", 5)
    assert (code, "leave out --images-per-part" in err) == (1, True)
    assert not (tmp_path / "out").exists()


def test_a_package_that_is_missing_is_named(
    model: Path, images: Path, command: Command, tmp_path: Path, monkeypatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("fastmsflow.report.par")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, _, err = command(model, images, "--out", tmp_path / "out")
    assert (code, err) == (1, "fastmsflow: Parquet needs pyarrow: pip install 'fastmsflow[shards]'")
    assert not (tmp_path / "out").exists()


def test_the_bar_shows_the_rate_and_what_was_there_before_does_not_count() -> None:
    clock = [0.0]
    with Progress(Rate("images"), console=Console(file=io.StringIO()), get_time=lambda: clock[0]) as progress:
        bar = Bar(progress, "scoring", 1000)
        bar.stage("scoring", 1000, 600)
        for clock[0] in (1.0, 2.0, 3.0):
            bar(600 + 50 * int(clock[0]))
        assert Rate("images").render(progress.tasks[0]).plain == "50.0 images/s"


# Memory


PEAKS = """\
from pathlib import Path
from fastmsflow.__main__ import main
from fastmsflow.report.parquet import Table

write = Table.write

def recorded(table, path, *args):
    write(table, path, *args)
    # Not ru_maxrss: a process begins with its parent's, here pytest's.
    print(path.name, Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

Table.write = recorded
main()
"""


def test_memory_does_not_grow_with_the_number_of_images(model: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(2_000):
        os.link(images / "00.png", tmp_path / f"in/{i:04}.png")
    write_shards(sorted((tmp_path / "in").iterdir()), tmp_path / "set", 100)
    options = (model, tmp_path / "set", "--out", tmp_path / "out", "--workers", 0, "--batch-size", 50, "--quiet")
    args = [sys.executable, "-c", PEAKS, "predict", *map(str, options), "--format", "parquet"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    printed = subprocess.run(args, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout.split()
    peaks = [int(value) for value in printed[1::2]]
    assert len(peaks) == 20
    assert peaks[-1] < 1.05 * peaks[1], f"peak RSS {peaks[1]} KiB after 200 images, {peaks[-1]} KiB after 2,000"
