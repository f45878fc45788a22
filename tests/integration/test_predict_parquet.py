"""``fastmsflow predict --format parquet``: a row for each image, and nothing lost on the way."""

import csv
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from fastmsflow import MSFlow
from fastmsflow.data import write_shards
from fastmsflow.data.shards.shard_set import is_shard_set
from fastmsflow.files import LOCK_FILE
from fastmsflow.progress import ProgressBar, RateColumn
from tests.helpers.disks import small_disk
from tests.helpers.predictions import IMAGES, PER_PART, SCORES, SIZES, Command, rows, setting, times

pq = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow: pip install 'fastmsflow[shards]'")


# What is written


@pytest.mark.parametrize("workers", [0, 2])
def test_the_rows_of_files_are_those_of_the_csv_in_the_order_of_the_images(
    workers: int, checkpoint: Path, noise_images: Path, predict_parquet: Command, tmp_path: Path
) -> None:
    of_parts = (
        checkpoint,
        noise_images,
        "--out",
        tmp_path / "parts",
        "--images-per-part",
        PER_PART,
        "--workers",
        workers,
    )
    code, _, err = predict_parquet(*of_parts, "--batch-size", 4)
    assert (code, err) == (0, "")
    predict_parquet(
        checkpoint, noise_images, "--out", tmp_path / "csv", "--batch-size", 4, "--no-heat-maps", form="csv"
    )
    with (tmp_path / "csv/scores.csv").open(newline="") as file:
        expected = {row["image"]: row for row in csv.DictReader(file)}

    found = rows(tmp_path / "parts")
    assert [
        pq.read_metadata(path).num_rows for path in sorted((tmp_path / "parts").glob("parts/part-*.parquet"))
    ] == SIZES
    assert [row["path"] for row in found] == sorted(map(str, noise_images.iterdir()))
    for row in found:
        of_csv = expected[row["path"]]
        assert [row[name] for name in SCORES] == [float(of_csv[name]) for name in SCORES]
        assert row["defective"] == (of_csv["label"] == "defective")
        assert row["largest_region"] == int(of_csv["largest_region"]) > 0
        assert 0 <= row["largest_region_left"] < row["largest_region_right"] <= 36
        assert row["fault"] is None
    assert {row["defective"] for row in found} == {True, False}


def test_shards_have_the_rows_of_their_files(
    checkpoint: Path, noise_images: Path, noise_shards: Path, predict_parquet: Command, tmp_path: Path
) -> None:
    given = ("--images-per-part", PER_PART, "--batch-size", PER_PART)
    predict_parquet(checkpoint, noise_images, "--out", tmp_path / "files", *given, "--workers", 0)
    code, _, err = predict_parquet(checkpoint, noise_shards, "--out", tmp_path / "shards", *given, "--workers", 2)
    assert (code, err) == (0, "")
    expected = [
        {**row, "path": f"{noise_shards}/{i // PER_PART:06}.tar/{Path(row['path']).name}"}
        for i, row in enumerate(rows(tmp_path / "files"))
    ]
    assert rows(tmp_path / "shards") == expected


@pytest.mark.parametrize("kind", ["manifest", "file://", "pipe:", "pipe of a URL"])
def test_shards_are_read_wherever_they_lie(
    kind: str, checkpoint: Path, noise_shards: Path, predict_parquet: Command, tmp_path: Path
) -> None:
    where = {
        "manifest": f"{noise_shards}/manifest.json",
        "file://": f"file://{noise_shards}",
        "pipe:": f"pipe:cat {noise_shards}/{{}}",
        "pipe of a URL": f"pipe:true s3://bucket && cat {noise_shards}/{{}}",
    }
    assert predict_parquet(checkpoint, where[kind], "--out", tmp_path, "--workers", 0)[0] == 0
    assert [Path(row["path"]).name for row in rows(tmp_path)] == [f"{i:02}.png" for i in range(IMAGES)]


def test_only_shards_are_taken_for_shards(noise_shards: Path, noise_images: Path, tmp_path: Path) -> None:
    assert is_shard_set("s3://bucket/set")
    assert is_shard_set("pipe:cat {}")
    assert is_shard_set(str(noise_shards))
    (tmp_path / "manifest.json").write_text('{"format": "another"}')
    assert not any(map(is_shard_set, [str(noise_images), str(noise_images / "00.png"), "*.png", "-", str(tmp_path)]))
    (tmp_path / "manifest.json").write_text("[")
    assert not is_shard_set(str(tmp_path))


def test_the_parts_read_as_one_table(
    checkpoint: Path, noise_shards: Path, predict_parquet: Command, tmp_path: Path
) -> None:
    dataset = pytest.importorskip("pyarrow.dataset")
    pandas = pytest.importorskip("pandas")
    predict_parquet(checkpoint, noise_shards, "--out", tmp_path, "--workers", 0)
    table = dataset.dataset(tmp_path / "parts", format="parquet").to_table()
    assert table.num_rows == IMAGES
    frame = pandas.read_parquet(tmp_path / "parts")
    assert [Path(path).name for path in frame["path"]] == [f"{i:02}.png" for i in range(IMAGES)]
    threshold = setting(tmp_path)["threshold"]
    assert ((frame["absolute_score"] > threshold) == frame["defective"]).all()


def test_the_summary_is_json(checkpoint: Path, noise_shards: Path, predict_parquet: Command, tmp_path: Path) -> None:
    code, out, _ = predict_parquet(checkpoint, noise_shards, "--out", tmp_path, "--workers", 0, "--json")
    summary = json.loads(out)
    assert code == 0
    assert (summary["images"], summary["good"], summary["defective"], summary["faults"]) == (IMAGES, 9, 9, 0)
    assert (summary["scored_now"], summary["parts"]) == (IMAGES, f"{tmp_path}/parts")


def test_without_a_threshold_there_are_no_labels(
    calibrated_model: MSFlow, noise_images: Path, predict_parquet: Command, tmp_path: Path
) -> None:
    calibration, calibrated_model.calibration = calibrated_model.calibration, None
    calibrated_model.save(tmp_path / "m.safetensors")
    calibrated_model.calibration = calibration
    code, out, _ = predict_parquet(tmp_path / "m.safetensors", noise_images, "--out", tmp_path / "out", "--workers", 0)
    assert (code, "no labels" in out) == (0, True)
    assert {(row["defective"], row["largest_region"]) for row in rows(tmp_path / "out")} == {(None, None)}


# Faults


def test_an_image_that_cannot_be_read_is_a_row_with_its_fault(
    checkpoint: Path, noise_images: Path, predict_parquet: Command, tmp_path: Path
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(noise_images, folder)
    (folder / "05.png").write_bytes((noise_images / "05.png").read_bytes()[:500])
    (folder / os.fsdecode(b"05 \xff.png")).write_bytes(b"")
    code, _, err = predict_parquet(
        checkpoint, folder, tmp_path / "none*.png", "--out", out, "--images-per-part", 5, "--workers", 0
    )
    assert code == 1
    assert f"skipped {folder}/05 \\xff.png: empty (0 bytes)" in err
    assert f"skipped {folder}/05.png: damaged or truncated" in err
    assert "none*.png: no file matches this pattern" in err
    found = rows(out)
    assert len(found) == IMAGES + 1
    bad = [row for row in found if row["fault"]]
    assert [row["path"] for row in bad] == [f"{folder}/05 \\xff.png", f"{folder}/05.png"]
    assert "empty (0 bytes)" in bad[0]["fault"]
    assert "damaged or truncated" in bad[1]["fault"]
    assert all(row[name] is None for row in bad for name in (*SCORES, "defective", "largest_region"))

    before = times(out)
    assert predict_parquet(checkpoint, folder, "--out", out, "--images-per-part", 5, "--workers", 0)[0] == 1
    assert times(out) == before, "an image that cannot be read was tried again"


def test_of_many_images_that_cannot_be_read_the_first_are_named(
    checkpoint: Path, noise_images: Path, predict_parquet: Command, tmp_path: Path
) -> None:
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(b"")
    names = [noise_images / "00.png", *sorted(tmp_path.glob("*.png"))]
    code, _, err = predict_parquet(
        checkpoint, *names, "--out", tmp_path / "out", "--images-per-part", 3, "--workers", 0
    )
    named = [
        f"skipped {tmp_path}/{i}.png: empty (0 bytes), not an image; remove it or save it as PNG" for i in range(4)
    ]
    rest = "skipped 2 more images that cannot be read or scored; their rows have the fault"
    assert (code, err.splitlines()) == (1, [*named, rest])


def test_a_score_that_is_not_finite_is_a_fault(
    calibrated_model: MSFlow, noise_images: Path, predict_parquet: Command, tmp_path: Path
) -> None:
    state = {name: tensor.clone() for name, tensor in calibrated_model.state_dict().items()}
    with torch.no_grad():
        calibrated_model.flow.fusion_flow.load_state_dict(
            {
                k: v * float("nan") if v.is_floating_point() else v
                for k, v in calibrated_model.flow.fusion_flow.state_dict().items()
            }
        )
    calibrated_model.save(tmp_path / "m.safetensors")
    calibrated_model.load_state_dict(state)
    code, _, _ = predict_parquet(
        tmp_path / "m.safetensors", noise_images / "00.png", "--out", tmp_path / "out", "--workers", 0
    )
    (row,) = rows(tmp_path / "out")
    assert (code, row["score"], "00.png: its score is not finite" in row["fault"]) == (1, None, True)


def cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:9000])


def padded(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes() + bytes(512))


def flipped(shard: Path) -> None:
    """A bit that no image holds."""
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(
    ("damage", "lost", "scored"),
    [(cut, 3, 1), (padded, 1, 4), (flipped, 1, 4), (Path.unlink, 4, 0)],
    ids=["cut", "padded", "a bit flipped", "missing"],
)
def test_a_damaged_shard_is_named_and_tried_again_when_it_is_mended(
    damage: Callable[[Path], None],
    lost: int,
    scored: int,
    checkpoint: Path,
    noise_shards_copy: Path,
    predict_parquet: Command,
    tmp_path: Path,
) -> None:
    """A wrong checksum alone loses no image; a row says that one may be wrong."""
    shard = noise_shards_copy / "000002.tar"
    options = ("--out", tmp_path / "out", "--workers", 0, "--batch-size", 2, "--images-per-part", PER_PART)
    whole = shard.read_bytes()
    damage(shard)
    code, _, err = predict_parquet(checkpoint, noise_shards_copy, *options)
    assert code == 1
    assert err.startswith(f"skipped {shard}: ")
    assert len(err.splitlines()) == 1
    found = rows(tmp_path / "out")
    gone = [row for row in found if row["path"] is None]
    assert len(gone) == lost
    assert len(found) - lost == IMAGES - PER_PART + scored
    assert all(str(shard) in row["fault"] and row["score"] is None for row in gone)

    shard.write_bytes(whole)
    code, printed, _ = predict_parquet(checkpoint, noise_shards_copy, *options, "--json")
    summary = json.loads(printed)
    assert (code, summary["images"], summary["faults"]) == (0, IMAGES, 0)
    assert summary["scored_now"] < IMAGES, "undamaged shards were scored again"
    names = [Path(row["path"]).name for row in rows(tmp_path / "out")]
    assert sorted(names) == [f"{i:02}.png" for i in range(IMAGES)]


def test_an_image_that_cannot_be_read_is_named_beside_those_that_are_lost_with_its_shard(
    checkpoint: Path, noise_images: Path, predict_parquet: Command, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    shutil.copytree(noise_images, folder)
    (folder / "08.png").write_bytes((noise_images / "08.png").read_bytes()[:2500])
    write_shards(sorted(folder.iterdir()), tmp_path / "set", 4)
    shard = tmp_path / "set/000002.tar"
    # Behind the second image.
    shard.write_bytes(shard.read_bytes()[:12000])
    code, _, err = predict_parquet(checkpoint, tmp_path / "set", "--out", tmp_path / "out", "--workers", 0)
    assert code == 1
    unread, lost = err.splitlines()
    assert unread.startswith(f"skipped {shard}: 08.png: damaged or truncated")
    assert lost.startswith(f"skipped {shard}: ")


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_full_disk_is_named_and_finished_parts_stay(
    checkpoint: Path, noise_shards: Path, predict_parquet: Command, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", "16k") as disk:
        given = ("--workers", 0, "--images-per-part", PER_PART, "--batch-size", PER_PART)
        code, _, err = predict_parquet(checkpoint, noise_shards, "--out", disk / "out", *given)
        assert code == 1
        assert err.endswith("cannot be written, the disk is full; free some space or choose another folder")
        assert len(err.splitlines()) == 1
        assert 1 <= len(times(disk / "out")) < len(SIZES)
        assert len(rows(disk / "out")) == PER_PART * len(times(disk / "out"))
        assert {path.name for path in (disk / "out").rglob(".*")} <= {LOCK_FILE}


# The command line


def test_options_of_parquet_without_parquet_are_refused(
    checkpoint: Path, noise_images: Path, noise_shards: Path, predict_parquet: Command, tmp_path: Path
) -> None:
    for extra in (("--images-per-part", 5), ("--cluster", "ray")):
        code, _, err = predict_parquet(checkpoint, noise_images, "--out", tmp_path / "out", *extra, form="csv")
        assert (code, err) == (1, f"fastmsflow: {extra[0]}: this needs --format parquet; add that, or leave it out"), (
            extra
        )
    for place in (noise_shards, "http://127.0.0.1:9/images"):
        code, _, err = predict_parquet(checkpoint, place, "--out", tmp_path / "out", form="jsonl")
        assert (code, err) == (1, f"fastmsflow: {place}: this needs --format parquet; add that, or leave it out")
    code, _, err = predict_parquet(checkpoint, noise_images, "--out", tmp_path / "out", "--heat-maps")
    assert (code, "--format parquet writes none" in err) == (1, True)
    code, _, err = predict_parquet(checkpoint, noise_shards, noise_images, "--out", tmp_path / "out")
    assert (code, "a set of shards is scored alone" in err) == (1, True)
    for cluster in ("slurm", "ray://", "ray://127.0.0.1", "ray://127.0.0.1:abc", "ray://:10001"):
        code, _, err = predict_parquet(checkpoint, noise_images, "--out", tmp_path / "out", "--cluster", cluster)
        line = f"cluster {cluster!r} is not known; give ray for this machine's, or ray://ADDRESS:10001"
        assert (code, err) == (1, f"fastmsflow: {line}")
    code, _, err = predict_parquet(
        checkpoint, noise_images, "--out", tmp_path / "out", "--cluster", "ray", "--workers", 0
    )
    assert (code, err) == (
        1,
        "fastmsflow: --workers: these are this machine's, and a cluster has its own; leave it out",
    )
    assert not (tmp_path / "out").exists()


def test_a_package_that_is_missing_is_named(
    checkpoint: Path, noise_images: Path, predict_parquet: Command, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, _, err = predict_parquet(checkpoint, noise_images, "--out", tmp_path / "out")
    assert (code, err) == (1, "fastmsflow: Parquet needs pyarrow: pip install 'fastmsflow[shards]'")
    assert not (tmp_path / "out").exists()


def test_the_bar_shows_the_rate_and_what_was_there_before_does_not_count() -> None:
    clock = [0.0]
    with Progress(RateColumn("images"), console=Console(file=io.StringIO()), get_time=lambda: clock[0]) as progress:
        bar = ProgressBar(progress, "scoring", 1000)
        bar.stage("scoring", 1000, 600)
        for clock[0] in (1.0, 2.0, 3.0):
            bar(600 + 50 * int(clock[0]))
        assert RateColumn("images").render(progress.tasks[0]).plain == "50.0 images/s"
