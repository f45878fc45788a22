"""``fastmsflow predict`` loses nothing when a file, a name or a disk is bad, or when it is interrupted."""

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from fastmsflow import InputError
from fastmsflow.inference.sorted_table import SortedTable
from fastmsflow.visualization.image_visualizer import ImageVisualizer
from tests.helpers.disks import small_disk
from tests.helpers.folder_listing import files_in, names_in
from tests.helpers.predictions import Command, table_rows


def test_bad_files_are_named_and_skipped_and_the_exit_code_says_so(
    brick_checkpoint: Path, brick_tiles: Path, predict: Command, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    whole = (brick_tiles / "0.png").read_bytes()
    for name, content in (("00 [zero].png", b""), ("1.png", whole), ("2.png", whole[:500]), ("3.png", b"text")):
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "pipe.png")
    (folder / "link.png").symlink_to("nowhere.png")
    code, _, err = predict(
        brick_checkpoint, folder, tmp_path / "none.png", tmp_path / "no*.tif", "--out", tmp_path / "out"
    )
    assert code == 1
    assert err.count("skipped ") == 7
    assert len(err.strip().splitlines()) == 7
    for name in ("00 [zero].png", "2.png", "3.png", "pipe.png", "link.png", "none.png", "no*.tif"):
        assert name in err
    assert [row["image"] for row in table_rows(tmp_path / "out")] == [str(folder / "1.png")]


def test_nothing_but_bad_files_is_an_error_that_leaves_earlier_results(
    brick_checkpoint: Path, brick_tiles: Path, predict: Command, tmp_path: Path
) -> None:
    predict(brick_checkpoint, brick_tiles, "--out", tmp_path / "out", "--no-heat-maps")
    before = (tmp_path / "out/scores.csv").read_bytes()
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    code, _, err = predict(brick_checkpoint, tmp_path / "a.png", tmp_path / "b.png", "--out", tmp_path / "out")
    assert code == 1
    assert err.startswith(f"fastmsflow: {tmp_path / 'a.png'}: empty (0 bytes)")
    assert err.endswith("; and 1 more")
    assert files_in(tmp_path / "out") == {"scores.csv": before}


NAMES = [b"a space.png", b"it's \"quoted\".png", b"new\nline.png", b"latin caf\xe9.png", b"[a].png", b"=1+1.png",
         b"-dash.png"]  # fmt: skip


def test_names_of_every_kind_survive(
    brick_checkpoint: Path, brick_tiles: Path, predict: Command, tmp_path: Path
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in NAMES:
        (folder / os.fsdecode(name)).write_bytes((brick_tiles / "0.png").read_bytes())
    listed = b"".join(os.fsencode(folder) + b"/" + name + b"\0" for name in NAMES)
    for given, options, stdin in ((folder, (), b""), ("-", ("--null",), listed), (f"{folder}/*.png", (), b"")):
        code, _, err = predict(brick_checkpoint, given, "--out", out, *options, stdin=stdin)
        assert (code, err) == (0, "")
        rows = table_rows(out)
        assert sorted(os.fsencode(Path(row["image"]).name) for row in rows) == sorted(NAMES)
        maps = {row["heat_map"] for row in rows}
        assert len(maps) == len(NAMES)
        assert all(name.isprintable() and (out / name).is_file() for name in maps)
    predict(brick_checkpoint, folder, "--out", out, "--format", "jsonl", "--no-heat-maps")
    lines = (out / "scores.jsonl").read_text(encoding="ascii").splitlines()
    assert sorted(os.fsencode(Path(json.loads(line)["image"]).name) for line in lines) == sorted(NAMES)


def test_a_fault_of_a_file_with_a_newline_is_one_line(
    brick_checkpoint: Path, brick_tiles: Path, predict: Command, tmp_path: Path
) -> None:
    bad = tmp_path / os.fsdecode(b"new\nline \xff.png")
    bad.write_bytes(b"")
    code, _, err = predict(brick_checkpoint, bad, brick_tiles / "0.png", "--out", tmp_path / "out")
    assert code == 1
    assert err.strip() == (
        f"skipped {tmp_path}/new\\nline \\xff.png: empty (0 bytes), not an image; remove it or save it as PNG"
    )


def test_same_and_long_names_do_not_overwrite_each_other(
    brick_checkpoint: Path, brick_tiles: Path, predict: Command, tmp_path: Path
) -> None:
    long = "n" * 251 + ".png"
    for name in ("a/1.png", "b/1.png", "b/1_2.png", "c/1.PNG", f"a/{long}", f"b/{long}"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((brick_tiles / "0.png").read_bytes())
    code, _, _ = predict(brick_checkpoint, *(tmp_path / name for name in "abc"), "--out", tmp_path / "out")
    assert code == 0
    assert len({row["heat_map"].casefold() for row in table_rows(tmp_path / "out")}) == 6
    assert len(list((tmp_path / "out").glob("*_heatmap.png"))) == 6


def test_results_can_lie_among_the_images(
    brick_checkpoint: Path, brick_tiles: Path, predict: Command, tmp_path: Path
) -> None:
    for folder, out in ((tmp_path / "a", tmp_path / "a"), (tmp_path / "b", tmp_path / "b/predictions")):
        folder.mkdir()
        (folder / "0.png").write_bytes((brick_tiles / "0.png").read_bytes())
        for _ in range(2):
            assert predict(brick_checkpoint, folder, "--out", out)[0] == 0
            assert [row["image"] for row in table_rows(out)] == [str(folder / "0.png")]
    code, _, err = predict(brick_checkpoint, tmp_path / "b/predictions", "--out", tmp_path / "b/predictions")
    assert code == 1
    assert "holds no images" in err
    assert "1 file that fastmsflow wrote is passed over" in err


def test_an_interrupted_run_keeps_earlier_results_and_its_own_apart(
    brick_checkpoint: Path, brick_tiles: Path, predict: Command, tmp_path: Path, monkeypatch
) -> None:
    predict(brick_checkpoint, brick_tiles, "--out", tmp_path)
    before = files_in(tmp_path)
    paint, calls = ImageVisualizer.paint, []

    def interrupted(*args, **options) -> Image.Image:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return paint(*args, **options)

    monkeypatch.setattr(ImageVisualizer, "paint", interrupted)
    code, _, err = predict(brick_checkpoint, brick_tiles, "--out", tmp_path, "--threshold", 0, "--batch-size", 2)
    assert code == 130
    assert f"interrupted after 3 of 6 images; those are in {tmp_path / 'unfinished'}" in err
    assert files_in(tmp_path) == before
    rows = table_rows(tmp_path / "unfinished")
    assert [row["label"] for row in rows] == ["defective"] * 3
    assert all((tmp_path / "unfinished" / row["heat_map"]).is_file() for row in rows)

    monkeypatch.setattr(ImageVisualizer, "paint", paint)
    assert predict(brick_checkpoint, brick_tiles / "5.png", "--out", tmp_path)[0] == 0
    assert not (tmp_path / "unfinished").exists()
    assert len(table_rows(tmp_path)) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_full_and_a_read_only_disk_lose_nothing(
    brick_checkpoint: Path, brick_tiles: Path, predict: Command, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", "300k") as disk:
        assert predict(brick_checkpoint, brick_tiles / "0.png", "--out", disk)[0] == 0
        before = files_in(disk)
        assert set(before) == {"0_heatmap.png", "scores.csv"}

        code, _, err = predict(brick_checkpoint, brick_tiles, "--out", disk)
        assert code == 1
        unfinished = disk / "unfinished"
        assert err.startswith(f"fastmsflow: {unfinished}/")
        assert err.endswith("cannot be written, the disk is full; free some space or choose another folder")
        assert len(err.splitlines()) == 1
        assert files_in(disk) == before
        rows = table_rows(unfinished)
        assert 1 <= len(rows) < 6
        assert names_in(unfinished) == {"scores.csv", *(row["heat_map"] for row in rows)}
        for row in rows:
            assert row["largest_region"]  # the last column: the row is whole
            Image.open(unfinished / row["heat_map"]).load()

        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        code, _, err = predict(brick_checkpoint, brick_tiles, "--out", disk)
        assert (code, err) == (1, f"fastmsflow: {disk}: a read-only disk; choose another folder")
        assert files_in(disk) == before


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_table_that_fills_the_disk_ends_with_a_whole_row(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        with (
            pytest.raises(InputError, match=r"scores\.jsonl: cannot be written, the disk is full"),
            closing(SortedTable(disk / "scores.jsonl", ("name",))) as rows,
        ):
            for i in range(1000):
                rows.add({"name": str(i) * 300}, i)
        lines = (disk / "scores.jsonl").read_bytes().splitlines(keepends=True)
        assert len(lines) == len(rows) > 10
        assert [json.loads(line)["name"] for line in lines] == [str(i) * 300 for i in range(len(lines))]


def test_an_output_folder_that_is_a_file_is_named(
    brick_checkpoint: Path, brick_tiles: Path, predict: Command, tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("mine")
    code, _, err = predict(brick_checkpoint, brick_tiles, "--out", tmp_path / "out")
    assert code == 1
    assert err == f"fastmsflow: {tmp_path / 'out'}: is or lies below a file, not a folder; choose another folder"
    assert (tmp_path / "out").read_text() == "mine"
