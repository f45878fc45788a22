"""The services of docs/engines.md, as they stand there, in a process of their own on this machine."""

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from PIL import Image

from fastmsflow.inference import BatchScorer
from tests.helpers.paths import ROOT
from tests.helpers.same_rows import assert_same_row

pa = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'fastmsflow[shards]'")
STARTS = 120.0
"""Seconds that a service may take to answer for the first time, on a busy machine."""
Post = Callable[[bytes], tuple[int, dict]]


def block(heading: str) -> str:
    """The Python of a section of the page."""
    section = (ROOT / "docs/engines.md").read_text().split(f"### {heading}\n")[1]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found
    return found[1]


@contextmanager
def serving(folder: Path, args: list[str], answers: Callable[[], bool]) -> Iterator[None]:
    """``args`` as a process, until the with block ends."""
    log = (folder / "log").open("w+")
    paths = os.pathsep.join([str(folder), str(ROOT), *filter(None, sys.path)])
    settings = {"PYTHONPATH": paths, "RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.Popen(
        args, cwd=folder, env=os.environ | settings, stdout=log, stderr=log, start_new_session=True
    )
    try:
        end = time.monotonic() + STARTS
        while not answers():
            assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()[-3000:]
            time.sleep(0.2)
        yield
    finally:
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGINT)
            process.wait(20)
        # Its own processes too, whatever has become of it.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        log.close()


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def posted(url: str, content: bytes, kind: str) -> tuple[int, dict]:
    request = urllib.request.Request(url, content, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def png_of(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


def check(post: Post, images: Path, model: Path) -> None:
    """A real image is scored as by the scorer; whatever else is sent comes back with what is wrong with it."""
    file = min(images.iterdir())
    status, row = post(file.read_bytes())
    (expected,) = BatchScorer(model)(pa.table({"path": [str(file)]})).to_pylist()
    assert status == 200
    assert row.keys() == expected.keys()
    assert_same_row(row, expected | {"path": "upload"})

    status, row = post(file.read_bytes()[:200])
    assert (status, row["score"]) == (422, None)
    assert row["fault"].startswith("upload: damaged or truncated")
    status, row = post(b"")
    assert status == 422
    assert row["fault"].startswith("upload: not an image")
    status, row = post(png_of(20000, 20000))
    assert status == 422
    assert row["fault"].startswith("upload: too large to decode (more than 179 megapixels)")


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/best.safetensors").write_bytes(checkpoint.read_bytes())
    return tmp_path


def test_litserve_scores_a_png_and_refuses_what_is_no_image_or_too_large(
    folder: Path, noise_images: Path, checkpoint: Path
):
    pytest.importorskip("litserve", reason="needs litserve: pip install litserve")
    port = free_port()
    text = block("LitServe")
    assert "port=8000" in text
    (folder / "service.py").write_text(text.replace("port=8000", f"port={port}"))
    root = f"http://127.0.0.1:{port}"

    def post(content: bytes) -> tuple[int, dict]:
        body = json.dumps({"image": base64.b64encode(content).decode()})
        return posted(f"{root}/predict", body.encode(), "application/json")

    with serving(folder, [sys.executable, "service.py"], lambda: is_up(f"{root}/health")):
        check(post, noise_images, checkpoint)
        assert posted(f"{root}/predict", b'{"image": "*"}', "application/json")[0] == 422
        # As base64 just over 32 MiB: a server that stops reading long before the end resets the connection.
        assert post(bytes(24 * 2**20))[0] == 413
        # It goes on serving after all of them.
        assert post(min(noise_images.iterdir()).read_bytes())[0] == 200


def test_ray_serve_scores_a_png_and_refuses_what_is_no_image_or_too_large(
    folder: Path, noise_images: Path, checkpoint: Path
):
    pytest.importorskip("ray.serve", reason="needs Ray Serve: pip install 'ray[serve]'")
    port = free_port()
    text = block("Ray Serve")
    assert "/models/best.safetensors" in text
    text = text.replace("/models/best.safetensors", str(folder / "runs/mine/best.safetensors"))
    text += f"""
import signal
import ray

ray.init(num_cpus=2, include_dashboard=False)
serve.start(http_options={{"host": "127.0.0.1", "port": {port}}})
serve.run(app)
signal.sigwait([signal.SIGINT])
serve.shutdown()
ray.shutdown()
"""
    (folder / "service.py").write_text(text)
    root = f"http://127.0.0.1:{port}"

    def post(content: bytes) -> tuple[int, dict]:
        return posted(root, content, "application/octet-stream")

    with serving(folder, [sys.executable, "service.py"], lambda: is_up(f"{root}/-/healthz")):
        check(post, noise_images, checkpoint)
        assert post(bytes(32 * 2**20 + 1)) == (413, {"fault": "more than 33554432 bytes"})
        assert post(min(noise_images.iterdir()).read_bytes())[0] == 200
