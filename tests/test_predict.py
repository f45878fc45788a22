"""``fastmsflow predict``: what it takes, what it writes, and that nothing is lost when a file or a disk is bad."""

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from disks import small_disk
from PIL import Image
from skimage import data as photographs

from fastmsflow import InputError, MSFlow
from fastmsflow.calibration import Calibration
from fastmsflow.data.file_search import find_images
from fastmsflow.data.image_io import load_image
from fastmsflow.inference.regions import find_regions
from fastmsflow.inference.tables import SortedTable
from fastmsflow.visualization.color_scale import ColorScale
from fastmsflow.visualization.image_visualizer import ImageVisualizer, Verdict

Command = Callable[..., tuple[int, str, str]]
COLUMNS = ["image", "score", "log_score", "absolute_score", "label", "threshold", "heat_map", "regions",
           "largest_region"]  # fmt: skip


@pytest.fixture
def command(predict) -> Command:
    return predict


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Six tiles of 96x80: 0.png to 5.png."""
    folder = tmp_path_factory.mktemp("tiles")
    for i in range(6):
        Image.fromarray(photographs.brick()[i * 70 : i * 70 + 80, 60:156]).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def network(images: Path) -> MSFlow:
    """Untrained, and calibrated so that three of the tiles are defective, and each has a region."""
    torch.manual_seed(0)
    model = MSFlow("test_efficientnet", pretrained=False, image_size=(64, 64), blocks=(1, 1, 1)).eval()
    with torch.no_grad():
        scores = model.scores(torch.stack([load_image(p, (64, 64)) for p in sorted(images.iterdir())]))
    middle = float(scores.absolute_score.sort().values[2:4].mean())
    peaks, pixels = scores.absolute_map.flatten(1).amax(dim=1), scores.absolute_map.flatten()
    model.calibration = Calibration((middle,) * 20, (0.9 * float(peaks.min()),) * 20, float(pixels.median()))
    return model


@pytest.fixture(scope="module")
def model(network: MSFlow, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "calibrated.safetensors"
    network.save(path)
    return path


@pytest.fixture(scope="module")
def uncalibrated(network: MSFlow, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "uncalibrated.safetensors"
    calibration, network.calibration = network.calibration, None
    network.save(path)
    network.calibration = calibration
    return path


def table(out: Path) -> list[dict[str, str]]:
    with (out / "scores.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_the_table_has_scores_labels_and_regions_highest_first(
    model: Path, network: MSFlow, images: Path, command: Command, tmp_path: Path
) -> None:
    code, out, err = command(model, images, "--out", tmp_path, "--batch-size", 4)
    assert (code, err) == (0, "")
    rows = table(tmp_path)
    assert list(rows[0]) == COLUMNS
    assert sorted(row["image"] for row in rows) == sorted(map(str, images.iterdir()))
    scores = [float(row["absolute_score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert [row["label"] for row in rows] == ["defective"] * 3 + ["good"] * 3
    assert "3 of 6 defective; threshold" in out
    assert network.calibration is not None
    limit = network.calibration.threshold().value
    assert all(float(row["threshold"]) == limit for row in rows)
    assert all((score > limit) == (row["label"] == "defective") for score, row in zip(scores, rows, strict=True))
    for row in rows:
        assert int(row["regions"]) >= 1
        assert 0 < int(row["largest_region"]) <= 96 * 80
        with Image.open(tmp_path / row["heat_map"]) as picture:
            picture.load()
            assert picture.width > 2 * 256
            assert picture.height > 256 * 80 // 96
    assert len(list(tmp_path.iterdir())) == 7


def test_scores_are_those_of_the_model_whatever_the_batch(
    model: Path, network: MSFlow, images: Path, command: Command, tmp_path: Path
) -> None:
    command(model, images, "--out", tmp_path, "--batch-size", 5, "--no-heat-maps")
    assert [p.name for p in tmp_path.iterdir()] == ["scores.csv"]
    for row in table(tmp_path):
        with torch.no_grad():
            scores = network.scores(load_image(row["image"], (64, 64))[None])
        for column in ("score", "log_score", "absolute_score"):
            assert float(row[column]) == pytest.approx(float(getattr(scores, column)), rel=1e-4)
        assert row["heat_map"] == ""


def test_json_lines_have_every_region_in_pixels_of_the_image(
    model: Path, images: Path, command: Command, tmp_path: Path
) -> None:
    code, _, _ = command(model, images / "0.png", "--out", tmp_path, "--format", "jsonl")
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
    model: Path, images: Path, command: Command, tmp_path: Path
) -> None:
    (tmp_path / "bad.png").write_bytes(b"")
    code, out, _ = command(model, images, tmp_path / "bad.png", "--out", tmp_path / "out", "--json")
    summary = json.loads(out)
    assert code == 1
    assert (summary["images"], summary["good"], summary["defective"]) == (6, 3, 3)
    assert len(summary["skipped"]) == 1
    assert summary["scores"] == str(tmp_path / "out/scores.csv")
    assert summary["region_threshold"] > 0
    assert command(model, images, "--out", tmp_path / "out", "--quiet") == (0, "", "")


def test_a_threshold_given_counts_more_than_the_calibrated_one(
    model: Path, images: Path, command: Command, tmp_path: Path
) -> None:
    _, out, _ = command(model, images, "--out", tmp_path, "--threshold", 1e9, "--no-heat-maps")
    assert "0 of 6 defective; threshold 1e+09 nats, as given" in out
    code, _, err = command(model, images, "--out", tmp_path, "--threshold", "nan")
    assert (code, err) == (1, "fastmsflow: the threshold is nan; give a number of nats")


def test_a_rate_of_false_alarms_that_cannot_be_had_is_refused(
    model: Path, images: Path, command: Command, tmp_path: Path
) -> None:
    assert command(model, images, "--out", tmp_path, "--false-alarms", 0.5, "--no-heat-maps")[0] == 0
    code, _, err = command(model, images, "--out", tmp_path / "out", "--false-alarms", 0.001)
    assert code == 1
    assert "needs 999 held-out good images, and there are 20" in err
    assert not (tmp_path / "out").exists()


def test_an_uncalibrated_model_scores_without_labels_and_says_how_to_get_them(
    uncalibrated: Path, images: Path, command: Command, tmp_path: Path
) -> None:
    code, out, _ = command(uncalibrated, images, "--out", tmp_path)
    assert code == 0
    assert "fastmsflow calibrate MODEL GOOD_IMAGES" in out
    assert {(row["label"], row["threshold"], row["regions"]) for row in table(tmp_path)} == {("", "", "")}
    command(uncalibrated, images, "--out", tmp_path, "--threshold", 0, "--no-heat-maps")
    assert {row["label"] for row in table(tmp_path)} == {"defective"}
    code, _, err = command(uncalibrated, images, "--out", tmp_path, "--false-alarms", 0.1)
    assert code == 1
    assert "not calibrated" in err


def test_options_come_from_a_file(model: Path, images: Path, command: Command, tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text(f"format: jsonl\nheat_maps: false\nout: {tmp_path / 'out'}\n")
    assert command(model, images, "--config", tmp_path / "options.yaml")[0] == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["scores.jsonl"]
    code, _, err = command(model, images, "--format", "xml")
    assert (code, err) == (1, "fastmsflow: format xml: give csv, jsonl or parquet")


def test_bad_files_are_named_and_skipped_and_the_exit_code_says_so(
    model: Path, images: Path, command: Command, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    whole = (images / "0.png").read_bytes()
    for name, content in (("00 [zero].png", b""), ("1.png", whole), ("2.png", whole[:500]), ("3.png", b"text")):
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "pipe.png")
    (folder / "link.png").symlink_to("nowhere.png")
    code, _, err = command(model, folder, tmp_path / "none.png", tmp_path / "no*.tif", "--out", tmp_path / "out")
    assert code == 1
    assert err.count("skipped ") == 7
    assert len(err.strip().splitlines()) == 7
    for name in ("00 [zero].png", "2.png", "3.png", "pipe.png", "link.png", "none.png", "no*.tif"):
        assert name in err
    assert [row["image"] for row in table(tmp_path / "out")] == [str(folder / "1.png")]


def test_nothing_but_bad_files_is_an_error_that_leaves_earlier_results(
    model: Path, images: Path, command: Command, tmp_path: Path
) -> None:
    command(model, images, "--out", tmp_path / "out", "--no-heat-maps")
    before = (tmp_path / "out/scores.csv").read_bytes()
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    code, _, err = command(model, tmp_path / "a.png", tmp_path / "b.png", "--out", tmp_path / "out")
    assert code == 1
    assert err.startswith(f"fastmsflow: {tmp_path / 'a.png'}: empty (0 bytes)")
    assert err.endswith("; and 1 more")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {"scores.csv": before}


NAMES = [b"a space.png", b"it's \"quoted\".png", b"new\nline.png", b"latin caf\xe9.png", b"[a].png", b"=1+1.png",
         b"-dash.png"]  # fmt: skip


def test_names_of_every_kind_survive(model: Path, images: Path, command: Command, tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in NAMES:
        (folder / os.fsdecode(name)).write_bytes((images / "0.png").read_bytes())
    listed = b"".join(os.fsencode(folder) + b"/" + name + b"\0" for name in NAMES)
    for given, options, stdin in ((folder, (), b""), ("-", ("--null",), listed), (f"{folder}/*.png", (), b"")):
        code, _, err = command(model, given, "--out", out, *options, stdin=stdin)
        assert (code, err) == (0, "")
        rows = table(out)
        assert sorted(os.fsencode(Path(row["image"]).name) for row in rows) == sorted(NAMES)
        maps = {row["heat_map"] for row in rows}
        assert len(maps) == len(NAMES)
        assert all(name.isprintable() and (out / name).is_file() for name in maps)
    command(model, folder, "--out", out, "--format", "jsonl", "--no-heat-maps")
    lines = (out / "scores.jsonl").read_text(encoding="ascii").splitlines()
    assert sorted(os.fsencode(Path(json.loads(line)["image"]).name) for line in lines) == sorted(NAMES)


def test_a_fault_of_a_file_with_a_newline_is_one_line(
    model: Path, images: Path, command: Command, tmp_path: Path
) -> None:
    bad = tmp_path / os.fsdecode(b"new\nline \xff.png")
    bad.write_bytes(b"")
    code, _, err = command(model, bad, images / "0.png", "--out", tmp_path / "out")
    assert code == 1
    assert err.strip() == (
        f"skipped {tmp_path}/new\\nline \\xff.png: empty (0 bytes), not an image; remove it or save it as PNG"
    )


def test_same_and_long_names_do_not_overwrite_each_other(
    model: Path, images: Path, command: Command, tmp_path: Path
) -> None:
    long = "n" * 251 + ".png"
    for name in ("a/1.png", "b/1.png", "b/1_2.png", "c/1.PNG", f"a/{long}", f"b/{long}"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((images / "0.png").read_bytes())
    code, _, _ = command(model, *(tmp_path / name for name in "abc"), "--out", tmp_path / "out")
    assert code == 0
    assert len({row["heat_map"].casefold() for row in table(tmp_path / "out")}) == 6
    assert len(list((tmp_path / "out").glob("*_heatmap.png"))) == 6


def test_results_can_lie_among_the_images(model: Path, images: Path, command: Command, tmp_path: Path) -> None:
    for folder, out in ((tmp_path / "a", tmp_path / "a"), (tmp_path / "b", tmp_path / "b/predictions")):
        folder.mkdir()
        (folder / "0.png").write_bytes((images / "0.png").read_bytes())
        for _ in range(2):
            assert command(model, folder, "--out", out)[0] == 0
            assert [row["image"] for row in table(out)] == [str(folder / "0.png")]
    code, _, err = command(model, tmp_path / "b/predictions", "--out", tmp_path / "b/predictions")
    assert code == 1
    assert "nothing but heat maps to score" in err


def test_an_interrupted_run_keeps_earlier_results_and_its_own_apart(
    model: Path, images: Path, command: Command, tmp_path: Path, monkeypatch
) -> None:
    command(model, images, "--out", tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    paint, calls = ImageVisualizer.paint, []

    def interrupted(*args, **options) -> Image.Image:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return paint(*args, **options)

    monkeypatch.setattr(ImageVisualizer, "paint", interrupted)
    code, _, err = command(model, images, "--out", tmp_path, "--threshold", 0, "--batch-size", 2)
    assert code == 130
    assert f"interrupted after 3 of 6 images; those are in {tmp_path / 'unfinished'}" in err
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before
    rows = table(tmp_path / "unfinished")
    assert [row["label"] for row in rows] == ["defective"] * 3
    assert all((tmp_path / "unfinished" / row["heat_map"]).is_file() for row in rows)

    monkeypatch.setattr(ImageVisualizer, "paint", paint)
    assert command(model, images / "5.png", "--out", tmp_path)[0] == 0
    assert not (tmp_path / "unfinished").exists()
    assert len(table(tmp_path)) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_full_and_a_read_only_disk_lose_nothing(model: Path, images: Path, command: Command, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "300k") as disk:
        assert command(model, images / "0.png", "--out", disk)[0] == 0
        before = {p.name: p.read_bytes() for p in disk.iterdir()}
        assert set(before) == {"0_heatmap.png", "scores.csv"}

        code, _, err = command(model, images, "--out", disk)
        assert code == 1
        unfinished = disk / "unfinished"
        assert err.startswith(f"fastmsflow: {unfinished}/")
        assert err.endswith("cannot be written, the disk is full; free some space or choose another folder")
        assert len(err.splitlines()) == 1
        assert {p.name: p.read_bytes() for p in disk.iterdir() if p.is_file()} == before
        rows = table(unfinished)
        assert 1 <= len(rows) < 6
        assert {p.name for p in unfinished.iterdir()} == {"scores.csv", *(row["heat_map"] for row in rows)}
        for row in rows:
            assert row["largest_region"]  # the last column: the row is whole
            Image.open(unfinished / row["heat_map"]).load()

        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        code, _, err = command(model, images, "--out", disk)
        assert (code, err) == (1, f"fastmsflow: {disk}: a read-only disk; choose another folder")
        assert {p.name: p.read_bytes() for p in disk.iterdir() if p.is_file()} == before


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_table_that_fills_the_disk_ends_with_a_whole_row(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        with (
            pytest.raises(InputError, match=r"scores\.jsonl: cannot be written, the disk is full"),
            SortedTable(disk / "scores.jsonl", ("name",)) as rows,
        ):
            for i in range(1000):
                rows.add({"name": str(i) * 300}, i)
        lines = (disk / "scores.jsonl").read_bytes().splitlines(keepends=True)
        assert len(lines) == len(rows) > 10
        assert [json.loads(line)["name"] for line in lines] == [str(i) * 300 for i in range(len(lines))]


def test_an_output_folder_that_is_a_file_is_named(model: Path, images: Path, command: Command, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    code, _, err = command(model, images, "--out", tmp_path / "out")
    assert code == 1
    assert err == f"fastmsflow: {tmp_path / 'out'}: is or lies below a file, not a folder; choose another folder"
    assert (tmp_path / "out").read_text() == "mine"


def found(*names: object, stdin: bytes = b"", null: bool = False) -> tuple[list[str], list[str]]:
    sources = find_images([str(name) for name in names], io.BytesIO(stdin), null)
    return [str(file) for file in sources.files], sources.faults


@pytest.fixture
def tree(tmp_path: Path, monkeypatch) -> Path:
    for name in ("1.png", "2.jpg", "day/3.png", "day/deep/4.png", "part[1].png", "part1.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_files_folders_and_patterns_are_found_each_once(tree: Path) -> None:
    assert found("1.png", ".") == (["1.png", "2.jpg", "day/3.png", "day/deep/4.png", "part1.png", "part[1].png"], [])
    assert found("*.png", "2.jpg")[0] == ["1.png", "part1.png", "part[1].png", "2.jpg"]
    assert found("**/*.png")[0] == ["1.png", "day/3.png", "day/deep/4.png", "part1.png", "part[1].png"]
    assert found(f"{tree}/d*")[0] == [f"{tree}/day/3.png", f"{tree}/day/deep/4.png"]
    assert found("part[1].png")[0] == ["part[1].png"]  # a file of that name comes before the pattern
    assert found("notes.txt")[0] == ["notes.txt"]  # what is named is tried


def test_names_on_standard_input_are_taken_as_they_are(tree: Path) -> None:
    assert found("-", stdin=b"1.png\r\n\nday\n*.png\n") == (["1.png", "day/3.png", "day/deep/4.png", "*.png"], [])
    assert found("-", stdin=b"1.png\0a\nb.png\0", null=True)[0] == ["1.png", "a\nb.png"]
    assert found("1.png", "-", stdin=b"") == (["1.png"], ["standard input: holds no names; list one a line"])
    with pytest.raises(InputError, match="--null is for names on standard input"):
        found("1.png", null=True)


def test_names_that_lead_to_nothing_are_faults(tree: Path) -> None:
    (tree / "empty").mkdir()
    files, faults = found("1.png", "*.bmp", "empty")
    assert files == ["1.png"]
    assert faults[0] == "*.bmp: no file matches this pattern"
    assert faults[1].startswith("empty: holds no images (")
    with pytest.raises(InputError, match="no file matches this pattern"):
        found("*.bmp")


def test_regions_are_what_is_connected_above_the_threshold_largest_first() -> None:
    score_map = np.zeros((20, 30), np.float32)
    score_map[2:4, 2:4] = 5
    score_map[10:20, 20:30] = 3  # in the corner
    score_map[14:16, 24:26] = 0  # a hole
    large, small = find_regions(score_map, 1.0, (300, 100))
    assert (large.area, small.area) == (96 * 50, 4 * 50)
    assert (large.peak, small.peak) == (3, 5)
    assert large.box == pytest.approx((200, 50, 300, 100), abs=10)
    assert large.box[2:] == (300, 100)  # to the image's very border
    assert small.box == pytest.approx((20, 10, 40, 20), abs=10)
    assert find_regions(score_map, 5.0, (300, 100)) == []


def test_regions_in_one_box_have_outlines_of_their_own() -> None:
    score_map = np.zeros((32, 32), np.float32)
    score_map[4:28, 4:28] = 2
    score_map[8:24, 8:24] = 0
    score_map[12:20, 12:20] = 2
    ring, dot = find_regions(score_map, 1.0, (32, 32))
    assert ring.box == pytest.approx((4, 4, 28, 28), abs=0.6)
    assert dot.box == pytest.approx((12, 12, 20, 20), abs=0.6)


@pytest.mark.parametrize("side", [64, 256, 1024])
def test_pictures_have_one_scale_whatever_the_image_and_an_outline(side: int) -> None:
    heat = ColorScale(3, "absolute", (0.0, 10.0), 5.0)
    painter = ImageVisualizer(heat, (side, side))
    image = Image.new("RGB", (200, 100), (128, 128, 128))
    shown = painter.shrink(image)
    assert shown.size == (max(256, side), max(256, side) // 2)
    score_map = np.zeros((side, side), np.float32)
    score_map[side // 4 : side // 2, side // 4 : side // 2] = 10
    blank = np.zeros_like(score_map)
    outlines = [region.outline for region in find_regions(score_map, 5.0, image.size)]
    verdict = Verdict("a name that is far too long for so small a picture, " * 4, "score", None)
    with_region = np.asarray(
        painter.paint(shown, score_map, outlines=outlines, size=image.size, verdict=verdict)
    ).astype(int)
    without = np.asarray(painter.paint(shown, blank, outlines=(), size=image.size, verdict=verdict)).astype(int)
    assert with_region.shape == without.shape
    changed = np.argwhere((with_region != without).any(axis=2))
    (top, left), (bottom, right) = changed.min(axis=0), changed.max(axis=0)
    width, height = shown.size
    # A quarter of the image each way and its outline; nothing in the image at the left, the words or the legend.
    assert right - left == pytest.approx(width / 4, abs=0.03 * width + 6)
    assert bottom - top == pytest.approx(height / 4, abs=0.03 * width + 6)
    assert left > width
    assert (with_region[top:bottom, left:right] == 255).all(axis=2).any()
