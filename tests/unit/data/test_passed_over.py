"""Images that are not read, and pictures that this product wrote, are passed over with a count."""

import csv
import io
import json
import os
import shutil
import tracemalloc
import warnings
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image

from fastmsflow import InputError
from fastmsflow.data import list_images, mvtec, open_image_set, read_image, visa
from fastmsflow.data.file_search import find_images
from fastmsflow.data.image_formats import FORMATS, SUFFIXES
from fastmsflow.data.url_images import images_below_url
from fastmsflow.errors import InputWarning
from fastmsflow.owned_files import record_files


def image(path: Path, kind: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 36), (90, 120, 30)).save(path, kind)
    return path


def warned(call: Callable[[], object]) -> tuple[list[str], list[str]]:
    """Returns the names of the images that ``call`` finds, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", InputWarning)
        found = call()
    names = [str(name) for name in (found if isinstance(found, list) else getattr(found, "files", []))]
    return names, [str(warning.message) for warning in caught if warning.category is InputWarning]


@pytest.mark.parametrize("table", ["scores.csv", "scores.jsonl"])
def test_a_table_of_one_line_without_end_fills_no_memory(table: str, tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    with (tmp_path / table).open("wb") as file:
        file.truncate(2**31)
    tracemalloc.start()
    try:
        assert warned(lambda: list_images(tmp_path))[0] == [str(tmp_path / "a.png")]
        assert tracemalloc.get_traced_memory()[1] < 2**28
    finally:
        tracemalloc.stop()


def test_a_run_among_the_kinds_of_defects_is_no_kind(tmp_path: Path) -> None:
    image(tmp_path / "train/good/0.png")
    image(tmp_path / "test/spot/0.png")
    # A folder that is claimed for new results, and one that holds some.
    (tmp_path / "test/new").mkdir()
    (tmp_path / "test/new/.lock").touch()
    image(tmp_path / "test/run/scores.png")
    record_files(tmp_path / "test/run", "evaluate", {"scores.png": None})
    with pytest.warns(InputWarning, match=r"1 file that fastmsflow wrote is passed over, in .*test/run"):
        images = open_image_set(tmp_path)
    assert {sample.kind for sample in images.test} == {"spot"}
    shutil.rmtree(tmp_path / "test/spot")
    with pytest.raises(InputError, match="test: holds no folders by kind of defect"):
        open_image_set(tmp_path)
    (tmp_path / "test/empty").mkdir()
    with pytest.raises(InputError, match="test/empty: holds no images"):
        open_image_set(tmp_path)


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_every_suffix_of_a_format_that_is_read_is_accepted_in_any_case(suffix: str, tmp_path: Path) -> None:
    kinds = {".jif": "JPEG", ".mpo": "JPEG", ".pgm": "PPM", ".dib": "DIB"}
    for name in (f"a{suffix}", f"b{suffix.upper()}"):
        read_image(image(tmp_path / name, kinds.get(suffix) or Image.EXTENSION[suffix]))
    assert warned(lambda: list_images(tmp_path)) == ([f"{tmp_path}/a{suffix}", f"{tmp_path}/b{suffix.upper()}"], [])


def test_suffixes_are_those_of_the_formats() -> None:
    assert {".jfif", ".jpe", ".jp2", ".tif", ".webp", ".gif", ".pgm", ".avif"} <= SUFFIXES
    assert "AVIF" in FORMATS
    assert not {".eps", ".pdf", ".ps", ".pfm"} & SUFFIXES


def test_images_in_formats_that_are_not_read_are_counted(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.HEIC").write_bytes(b"a photograph of a phone")
    (tmp_path / "x.dng").write_bytes(b"raw")
    only = image(tmp_path / "a.png")
    names, lines = warned(lambda: list_images(tmp_path))
    assert names == [str(only)]
    (line,) = lines
    assert line.startswith("4 files look like images and are not read (3 .heic; 1 .dng), the first ")


@pytest.mark.parametrize(
    "name", ["photo", "photo.dat", "photo.0001", "photo.jpg~", "photo.png.bak", "photo.txt", ".photo.png"]
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "WEBP", "PPM"])
def test_images_of_another_suffix_are_recognized_by_content(name: str, kind: str, tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    image(tmp_path / name, kind)
    _, (line,) = warned(lambda: list_images(tmp_path))
    assert line.startswith("1 file looks like an image and is not read")
    assert name in line


def test_files_that_are_no_images_are_not_counted(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    for name, content in (
        ("notes.txt", b"BM of the line"), ("list", b"P1 is a part\nP5 another"), ("table.csv", b"II*"), (".b.png", b""),
        ("._a.png", b"\0\5\x16\7"), ("empty", b""), ("model.safetensors", bytes(64)), (".a.aside-1.png", b""),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone").symlink_to("nowhere")
    assert warned(lambda: list_images(tmp_path))[1] == []


def test_a_search_looks_into_a_bounded_number_of_files(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("fastmsflow.data.passed_over.MOST_OPENED", 3)
    content = image(tmp_path / "a.png").read_bytes()
    for i in range(5):
        (tmp_path / f"{i}.dat").write_bytes(content)
        (tmp_path / f"{i}.txt").write_bytes(b"notes")
    _, (line,) = warned(lambda: list_images(tmp_path))
    assert line.startswith("at least 3 files look like images and are not read (3 .dat)")


def test_a_folder_of_nothing_else_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds no images \(.*1 file looks like an image .*\(1 \.heic\)"):
        list_images(tmp_path)
    with pytest.raises(InputError, match=r"holds no images \(.*1 file looks like an image .*\(1 \.heic\)"):
        find_images([str(tmp_path)], io.BytesIO(b""))


def test_several_folders_are_one_line_and_each_file_counts_once(tmp_path: Path) -> None:
    for name in ("a/1", "a/in/2", "b/3"):
        image(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.heic").touch()
    sources = [str(tmp_path / name) for name in ("a", "a/in", "b")]
    names, (line,) = warned(lambda: find_images(sources, io.BytesIO(b"")))
    assert len(names) == 3
    assert "(3 .heic)" in line


def test_images_beside_those_of_a_layout_are_told_in_one_line(tmp_path: Path) -> None:
    for name in ("train/good/1", "test/good/1", "test/dent/1", "ground_truth/dent/1_mask"):
        image(tmp_path / f"{name}.png")
    assert warned(lambda: open_image_set(tmp_path))[1] == []
    for name in ("train/bad/1", "validation/good/1", "validation/good/2", "test/flat", "ground_truth/dent/none"):
        image(tmp_path / f"{name}.png")
    (tmp_path / "train/good/2.heic").touch()
    for call in (lambda: open_image_set(tmp_path), lambda: mvtec(tmp_path.parent, tmp_path.name)):
        _, (line,) = warned(call)
        assert line.startswith("6 files look like images and are not read (")
        for part in ("1 .heic", "2 in validation/good", "1 in train/bad"):
            assert part in line


def test_images_that_a_visa_table_does_not_name_are_counted(tmp_path: Path) -> None:
    image(tmp_path / "nut/Data/Images/1.JPG")
    image(tmp_path / "nut/Data/Images/2.JPG")
    (tmp_path / "split_csv").mkdir()
    (tmp_path / "split_csv/1cls.csv").write_text(
        "object,split,label,image,mask\nnut,train,normal,nut/Data/Images/1.JPG,\n"
    )
    _, (line,) = warned(lambda: visa(tmp_path, "nut"))
    assert line.startswith("1 file looks like an image and is not read (1 in Data/Images)")


def test_images_behind_a_url_are_counted_by_their_names(tmp_path: Path) -> None:
    for name in ("a.png", "out/a_heatmap.png", "mine/b_heatmap.png"):
        image(tmp_path / name)
    (tmp_path / "out/scores.csv").touch()
    (tmp_path / "b.heic").touch()
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        server = f"http://127.0.0.1:{http.server_port}"
        names, lines = warned(lambda: images_below_url(server))
        http.shutdown()
    assert names == [f"{server}/a.png", f"{server}/mine/b_heatmap.png"]
    assert lines[0].startswith("1 file looks like an image and is not read (1 .heic), the first http")
    assert lines[1] == f"1 file that fastmsflow wrote is passed over, in {server}/out"


def written(folder: Path, how: str) -> None:
    """Writes pictures into ``folder`` as this version or an earlier one does, beside a user's own."""
    for name in ("mine.png", "own_heatmap.png"):
        image(folder / name)
    if how == "record":
        for name in ("a_heatmap.png", "logs/b_heatmap.png"):
            image(folder / name)
        record_files(folder, "predict", dict.fromkeys(("a_heatmap.png", "logs/b_heatmap.png")))
    elif how in ("csv", "jsonl"):
        columns = ("image", "score", "log_score", "absolute_score", "label", "threshold", "heat_map", "regions")
        row = dict.fromkeys(columns, None) | {"image": "a.png", "heat_map": "a_heatmap.png"}
        with (folder / f"scores.{how}").open("w") as file:
            if how == "csv":
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerow(row)
            else:
                file.write(f"{json.dumps(row)}\n{{cut off")
        image(folder / "a_heatmap.png")
        image(folder / "unfinished/b_heatmap.png")
        (folder / f"unfinished/scores.{how}").write_text("image,sco")
    elif how == "run":
        for name in ("results.json", "config.yaml"):
            (folder / name).touch()
        image(folder / "training.png")
        image(folder / "scores.png")
    else:
        (folder / "report.html").touch()
        (folder / "scores.csv").write_text("image,label,kind,score,log_score,absolute_score\n")
        image(folder / "heatmaps.png")
        image(folder / "scores.png")


@pytest.mark.parametrize("how", ["record", "csv", "jsonl", "run", "evaluation"])
def test_pictures_that_this_product_wrote_are_passed_over_and_a_users_own_are_not(how: str, tmp_path: Path) -> None:
    image(tmp_path / "1.png")
    written(tmp_path / "r", how)
    names, lines = warned(lambda: list_images(tmp_path))
    assert names == [f"{tmp_path}/{name}" for name in ("1.png", "r/mine.png", "r/own_heatmap.png")]
    assert [line[:48] for line in lines] == ["2 files that fastmsflow wrote are passed over, i"]


def test_what_is_listed_or_matched_is_passed_over_and_what_is_named_is_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "r", "record")
    listed = io.BytesIO(b"r/a_heatmap.png\nr/logs/b_heatmap.png\nr/mine.png\n")
    names, (line,) = warned(lambda: find_images(["-"], listed))
    assert (names, line[:9]) == (["r/mine.png"], "2 files t")
    assert warned(lambda: find_images(["r/*.png"], listed))[0] == ["r/mine.png", "r/own_heatmap.png"]
    assert warned(lambda: find_images(["r/a_heatmap.png"], listed)) == (["r/a_heatmap.png"], [])
    # Searched from within, and through a link.
    with pytest.raises(InputError, match=r"holds no images .*1 file that fastmsflow wrote is passed over, in r/logs"):
        list_images("r/logs")
    image(tmp_path / "r/logs/mine.png")
    (tmp_path / "link").symlink_to("r")
    expected = [f"link/{name}" for name in ("logs/mine.png", "mine.png", "own_heatmap.png")]
    assert warned(lambda: list_images("link"))[0] == expected


def test_a_photograph_in_the_place_of_a_heat_map_is_read(tmp_path: Path) -> None:
    written(tmp_path, "csv")
    own = {name: (tmp_path / name).stat().st_size for name in ("scores.csv", "a_heatmap.png")}
    record_files(tmp_path, "predict", own)
    assert f"{tmp_path}/a_heatmap.png" not in warned(lambda: list_images(tmp_path))[0]
    Image.new("RGB", (50, 70)).save(tmp_path / "a_heatmap.png")
    assert f"{tmp_path}/a_heatmap.png" in warned(lambda: list_images(tmp_path))[0]


def test_a_table_of_somebody_else_hides_no_image(tmp_path: Path) -> None:
    image(tmp_path / "a_heatmap.png")
    (tmp_path / "scores.csv").write_text("image,grade,heat_map\na.png,1,a_heatmap.png\n")
    (tmp_path / ".fastmsflow.json").write_text("[[[")
    assert warned(lambda: list_images(tmp_path)) == ([f"{tmp_path}/a_heatmap.png"], [])
    (tmp_path / "scores.csv").unlink()
    os.mkfifo(tmp_path / "scores.csv")
    assert len(list_images(tmp_path)) == 1


@pytest.mark.slow
def test_own_pictures_are_neither_learned_from_nor_scored_however_often_verbs_run(
    tmp_path: Path, command, weights: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(random.integers(0, 256, (48, 64, 3), np.uint8)).save(f"{i}.png")
    (tmp_path / "4.heic").touch()
    options = (
        "--extractor", "test_resnet.r160_in1k", "--extractor-weights", weights, "--image-size", 64, "--hold-out", 0,
        "--meta-epochs", 1, "--sub-epochs", 1, "--batch-size", 4, "--warmup", 0,
    )  # fmt: skip
    for run in ("r1", "r2", "deep/r3"):
        code, text = command("train", ".", "--out", run, *options)
        assert code == 0, text
        assert "4 training images" in text
        assert text.count("1 file looks like an image and is not read (1 .heic)") == 1
        assert ("fastmsflow wrote" in text) == (run != "r1")
    for out in ("p1", "p2", "p2", "deep/p3"):
        code, text = command("predict", "r1/last.safetensors", ".", "--out", out, "--threshold", 1, "--json")
        assert code == 0, text
        assert '"images": 4,' in text
        assert text.count("that fastmsflow wrote are passed over") == 1
    code, text = command("predict", "r1/last.safetensors", ".", "--out", "q", "--format", "parquet", "--workers", 0)
    assert (code, "4 of 4 images scored" in text) == (0, True)
    code, text = command("calibrate", "r1/last.safetensors", ".", "--false-alarms", 0.3, "--out", "c.safetensors")
    assert (code, "from 4 " in text) == (0, True), text
    code, text = command("predict", "r1/last.safetensors", "p1/0_heatmap.png", "--out", "one", "--json")
    assert (code, '"images": 1,' in text) == (0, True)


def test_shards_of_a_folder_hold_none_of_this_products_pictures(tmp_path: Path, command, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    image(tmp_path / "1.png")
    shutil.copytree(tmp_path, tmp_path / "r")
    written(tmp_path / "r", "run")
    code, text = command("shard", ".", "--out", "shards")
    assert code == 0
    assert "4 images in 1 shard," in text
    assert text.count("2 files that fastmsflow wrote are passed over, in ./r") == 1


@pytest.mark.parametrize(
    "head", [b"<svg xmlns=", b"gimp xcf v011", b"\xff\xd8\xff\xf7", b"\x01\xda\0\1\0\3", b"BPG\xfb"]
)
def test_images_of_formats_that_are_not_read_are_known_by_their_content(head: bytes, tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    (tmp_path / "scan").write_bytes(head)
    _, lines = warned(lambda: open_image_set(tmp_path))
    assert lines == [
        f"1 file looks like an image and is not read (1 without a suffix), the first {tmp_path}/scan; save them as PNG,"
        " or give them the suffix of their format"
    ]
