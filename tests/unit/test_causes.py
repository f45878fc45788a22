"""A message names the cause that a fault has, and no other that it might have had."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmsflow import InputError, MSFlow
from fastmsflow.benchmarking.compare import compare
from fastmsflow.compat.official_checkpoint import read_pickle
from fastmsflow.data import ShardSet, list_images, open_image_set, read_image, write_shards
from fastmsflow.errors import in_one_line
from fastmsflow.inference.loading import read_model
from fastmsflow.nn.extractor_weights import read_state_dict
from fastmsflow.training.read_run_state import load_state
from tests.helpers.tiny_model import tiny_model
from tests.helpers.web_servers import send, web_server

READERS = {
    "checkpoint": MSFlow.load,
    "official checkpoint": read_pickle,
    "weights": read_state_dict,
    "state of a run": load_state,
    "benchmark": lambda path: compare(path, path),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in range(20):
        Image.fromarray(np.full((40, 40, 3), 10 * i, np.uint8)).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def shards(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set") / "shards"
    write_shards(list_images(images), folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    tiny_model().save(path)
    return path


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_called_what_it_is(reader: str, tmp_path: Path) -> None:
    read = READERS[reader]
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for name, fact in {
        "none": "no such file; ",
        "link": "a link to a file that is not there; ",
        "circle": "cannot be looked for (Too many levels of symbolic links); ",
        "file/below": "cannot be looked for (Not a directory); ",
        "pipe": "a pipe or a device, not a file; save it as a file",
        "folder": "a folder",
    }.items():
        with pytest.raises(InputError) as caught:
            read(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: {fact}")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("status", [500, 502, 503, 429, 403, 404])
def test_a_server_that_fails_is_not_called_a_file_that_is_not_there(status: int) -> None:
    with web_server(lambda request: send(request, b"", status)) as url:
        for read, place in ((ShardSet.from_source, f"{url}/set"), (read_model, f"{url}/model.safetensors")):
            with pytest.raises(InputError) as caught:
                read(place)
            fact = "no such file" if status == 404 else f"the server answers with status {status}; "
            assert f": {fact}" in str(caught.value)


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.EIO, r"cannot be read \(Input/output error\); look after its disk"),
        (errno.ESTALE, r"cannot be read \(Stale file handle\)"),
        (errno.EMFILE, "too many files are open; raise `ulimit -n`"),
        (errno.EACCES, "no permission to read it"),
        (None, "damaged or truncated"),
    ],
)
def test_an_image_that_the_system_does_not_give_is_not_called_damaged(
    number: int | None, told: str, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("truncated") if number is None else OSError(number, os.strerror(number))

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(InputError, match=f"^{images}/00.png: {told}"):
        read_image(images / "00.png")


def test_a_folder_that_fails_to_be_read_is_not_given_another_mode(images: Path, monkeypatch) -> None:
    def fail(_: str) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("fastmsflow.data.file_search._scan", fail)
    with pytest.raises(InputError, match=r"cannot be read \(Input/output error\); leave it out"):
        list_images(images)


def test_an_error_of_the_system_has_the_file_and_a_remedy() -> None:
    error = FileNotFoundError(errno.ENOENT, "No such file or directory", "/x\ny")
    assert in_one_line(error) == r"/x\ny: no such file or directory; look after it, or give another file or folder"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="there is no /proc here")
@pytest.mark.parametrize("verb", ["predict", "shard", "convert", "calibrate"])
def test_where_no_folder_can_be_made_the_remedy_is_another_one(
    verb: str, images: Path, checkpoint: Path, command
) -> None:
    words = {
        "predict": (checkpoint, images, "--out", "/proc/self/x"),
        "shard": (images, "--out", "/proc/x"),
        "convert": (checkpoint, "/proc/x.pt"),
        "calibrate": (checkpoint, images, "--out", "/proc/x.safetensors"),
    }
    code, out = command(verb, *words[verb])
    assert code == 1
    assert out.splitlines()[-1].endswith(": no file or folder can be made there; choose another folder")
    assert "Errno" not in out


@pytest.mark.parametrize("verb", ["calibrate", "evaluate", "verify", "shard"])
def test_shards_are_called_shards_where_they_are_not_taken(
    verb: str, shards: Path, checkpoint: Path, command, tmp_path: Path
) -> None:
    words = (shards, "--out", tmp_path / "o") if verb == "shard" else (checkpoint, shards)
    code, out = command(verb, *words)
    assert code == 1
    line = "shards, which only `train` and `predict --format parquet` take; give files of images, or their folder"
    assert out.splitlines()[-1] == f"fastmsflow: {shards}: {line}"


@pytest.mark.parametrize(("source", "what"), [("s3://bucket/set", "a URL"), ("pipe:cat {}", "a command")])
def test_places_of_shards_are_called_what_they_are(source: str, what: str, checkpoint: Path, command) -> None:
    for verb in ("calibrate", "evaluate"):
        code, out = command(verb, checkpoint, source)
        assert code == 1
        assert out.splitlines()[-1].startswith(f"fastmsflow: {source}: {what}, which only `train` and")
    with pytest.raises(InputError, match=what):
        open_image_set(source)


def test_calibrate_does_not_call_images_held_out_that_it_does_not_know(
    images: Path, checkpoint: Path, command, tmp_path: Path
) -> None:
    code, out = command("calibrate", checkpoint, images, "--out", tmp_path / "calibrated.safetensors")
    assert code == 0
    assert "from 20 good images)" in out
    assert "held-out" not in out
    assert f"this holds if {checkpoint} was trained on none of these images" in out
