"""Shards on servers, in commands and in files that give nothing, or too little, end a reading in time by one line."""

import os
import re
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from fastmsflow import InputError
from fastmsflow.data import ShardedImages
from fastmsflow.data.image_batches import ShardBatches
from fastmsflow.data.shards import timed_reading
from fastmsflow.errors import in_one_line
from tests.helpers.shards import SIZE, numbers
from tests.helpers.web_servers import send, web_server

pytest.importorskip("aiohttp", reason="needs aiohttp")

TOO_SLOW = r"cannot be read \(less than 1 MiB came within 1 s\)"


@pytest.fixture(autouse=True)
def one_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timed_reading, "TIMEOUT", 1.0)


def silence(request: BaseHTTPRequestHandler, content: bytes) -> None:
    time.sleep(4)


def drip(request: BaseHTTPRequestHandler, content: bytes) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    for byte in content[:40] if request.command == "GET" else b"":
        request.wfile.write(bytes([byte]))
        request.wfile.flush()
        time.sleep(0.1)


def break_off(request: BaseHTTPRequestHandler, content: bytes) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(content[: len(content) // 2])
    request.connection.close()


def of_folder(folder: Path, wrong: str, answer: Callable[[BaseHTTPRequestHandler, bytes], None]):
    """Answers with the files of ``folder``, but for the file ``wrong``."""

    def reply(request: BaseHTTPRequestHandler) -> None:
        name = request.path.lstrip("/")
        content = (folder / name).read_bytes()
        if name != wrong:
            return send(request, content)
        try:
            return answer(request, content)
        except OSError:
            return None  # the client has gone

    return reply


@pytest.mark.parametrize("wrong", ["manifest.json", "000001.tar"])
@pytest.mark.parametrize(("answer", "why"), [(silence, TOO_SLOW), (drip, TOO_SLOW), (break_off, "")])
def test_a_server_that_gives_too_little_is_named(
    answer: Callable[[BaseHTTPRequestHandler, bytes], None], why: str, wrong: str, jpeg_shards: Path
) -> None:
    begin = time.monotonic()
    with web_server(of_folder(jpeg_shards, wrong, answer)) as url, pytest.raises(InputError) as raised:
        numbers(ShardedImages(url, SIZE))
    assert re.match(rf"{url}/{wrong}: .*{why}", in_one_line(raised.value)), raised.value
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("workers", [0, 1])
def test_a_command_that_prints_nothing_is_named_and_ended(workers: int, jpeg_shards: Path, tmp_path: Path) -> None:
    command = f"case {{}} in *.json) cat {jpeg_shards}/{{}};; *) echo $$ > {tmp_path}/process; exec sleep 99;; esac"
    with pytest.raises(InputError, match=rf"(?s)pipe:case .*{TOO_SLOW}"):
        numbers(ShardedImages(f"pipe:{command}", SIZE, workers=workers), workers)
    with pytest.raises(ProcessLookupError):
        for _ in range(40):
            os.kill(int((tmp_path / "process").read_text()), 0)
            time.sleep(0.05)


def test_a_command_that_prints_nothing_loses_its_shards_when_they_are_scored(jpeg_shards: Path) -> None:
    shards = ShardBatches(f"pipe:case {{}} in *.json) cat {jpeg_shards}/{{}};; *) exec sleep 4;; esac")
    (batch,) = shards.batches(shards.manifest.shards[0], 8)
    assert batch.lost == 4 and re.search(TOO_SLOW, batch.fault)


def test_a_command_that_fails_at_its_end_is_an_error_though_all_was_printed(jpeg_shards: Path) -> None:
    with pytest.raises(InputError, match="exit 7"):
        numbers(ShardedImages(f"pipe:cat {jpeg_shards}/{{}}; exit 7", SIZE))


@pytest.mark.parametrize("name", ["manifest.json", "000001.tar"])
@pytest.mark.parametrize("kind", ["a pipe", "a folder"])
def test_what_is_no_file_is_refused(name: str, kind: str, jpeg_shards_copy: Path) -> None:
    path = jpeg_shards_copy / name
    path.unlink()
    if kind == "a pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(InputError, match=f"{path}: a pipe, a device or a folder, not a file; copy"):
        numbers(ShardedImages(jpeg_shards_copy, SIZE))


def test_a_slow_reader_is_no_slow_server(jpeg_shards: Path) -> None:
    images = ShardedImages(f"pipe:cat {jpeg_shards}/{{}}", SIZE, shuffle=False, buffer=1)
    for number, _ in enumerate(images):
        if number < 2:
            time.sleep(1.2)
        if number == 6:
            break
