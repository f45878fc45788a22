"""Images behind URLs: what a server or a store can do wrong ends in time, in one line that says what."""

import multiprocessing
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest

from fastmsflow import InputError
from fastmsflow.data import url_images
from fastmsflow.data.url_images import images_below_url, is_there, is_url, open_image, read_url
from fastmsflow.errors import UnavailableError
from tests.helpers.batches import png
from tests.helpers.web_servers import send, web_server

fsspec = pytest.importorskip("fsspec", reason="needs fsspec: pip install 'fastmsflow[shards]'")
pytest.importorskip("aiohttp", reason="needs aiohttp: pip install 'fastmsflow[shards]'")

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 36, 3), np.uint8)
CONTENT = png(PIXELS)
PAGES = {
    "/": '<a href="../"></a> <a href="./"></a> <a href="a.png">a</a> <a href="sub/"></a> <a href="gone/"></a>',
    "/sub/": '<a href="../">up</a> <a href="/sub/b%20c.JPG">b</a> <a href="notes.txt">n</a> <a href="http://x/y.png">',
    "/none.html/": "no links",
    "/links/": """<A HREF='a%20b.png'><a class="x" href = c.png><a href="d&amp;e.png"><a href="sub/../f.png">
        <a href="?C=N;O=D"><a href="http://[/z.png"><a href="mailto:a@b"><a href="/a.png"><a name="a"><a href="#top">
        <a href="g.png?w=1"><a href="h.png#f"><!-- <a href="y.png"> --><img src="x.png">""",
    "/broken/": '<a href="a.png">a</a> <a href="500/">worse</a>',
}


def answer(request: BaseHTTPRequestHandler) -> None:
    path = request.path
    status = path.strip("/").rpartition("/")[2]
    if status.isdecimal():
        send(request, b"", int(status))
    elif path.startswith("/to/"):
        send(request, b"", 302, Location=path.removeprefix("/to"))
    elif path.startswith("/loop"):
        send(request, b"", 302, Location=f"{path}x")
    elif path == "/away":
        send(request, b"", 302, Location="file:///etc/passwd")
    elif path == "/endless":
        request.send_response(200)
        request.end_headers()
        while True:
            request.wfile.write(bytes(2**16))
    elif path == "/cut":
        request.send_response(200)
        request.send_header("Content-Length", "1000000")
        request.end_headers()
        request.wfile.write(CONTENT)
    elif path.removesuffix("index.html") in PAGES:
        path = path.removesuffix("index.html")
        send(request, f"<html>{PAGES[path]}</html>".encode(), Content_Type="text/html")
    elif f"{path}/" in PAGES:
        send(request, b"", 301, Location=f"{path}/")
    elif path.partition("?")[0].lower().endswith((".png", ".jpg")):
        send(request, CONTENT)
    else:
        send(request, b"", 404)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with web_server(answer) as url:
        yield url


@pytest.fixture(scope="module")
def silent() -> Iterator[str]:
    """A server that takes requests and never answers."""
    ended = threading.Event()
    with web_server(lambda request: ended.wait(30)) as url:
        yield url
        ended.set()


@pytest.fixture(scope="module")
def nobody() -> str:
    """The address of a server that is gone."""
    with web_server(answer) as url:
        return url


def refusal(url: str, function=read_url) -> str:
    with pytest.raises(InputError) as refused:
        function(url)
    line = str(refused.value)
    assert "\n" not in line
    assert line.startswith(f"{url}: ")
    return line.removeprefix(f"{url}: ")


# Web servers


def test_an_image_is_read_from_a_web_server(server: str) -> None:
    for path in ("/a.png", "/a%20b.png", "/a b.png", "/é.png", "/signed.png?Signature=a%2Fb", "/to/a.png"):
        assert read_url(f"{server}{path}") == CONTENT
        assert is_there(f"{server}{path}")
    assert np.array_equal(np.asarray(open_image(f"{server}/a.png")), PIXELS)
    assert is_url(f"{server}/a.png")
    assert not is_url("folder/a.png")


def test_what_a_server_answers_is_told_with_what_to_do(server: str) -> None:
    for status in (404, 410):
        assert refusal(f"{server}/{status}") == "no such file"
        assert not is_there(f"{server}/{status}")
    for status in (401, 403):
        line = f"the server answers with status {status}; give a signed URL, or let everybody read it"
        assert refusal(f"{server}/{status}") == refusal(f"{server}/{status}", is_there) == line
    for status in (400, 429, 500, 503):
        line = f"the server answers with status {status}; try it in a browser, or later"
        assert refusal(f"{server}/{status}") == refusal(f"{server}/{status}", is_there) == line
        assert refusal(f"{server}/{status}/", images_below_url) == line
    assert refusal(f"{server}/404", open_image) == "no such file"


def test_redirects_end(server: str) -> None:
    assert refusal(f"{server}/to/500").startswith("the server answers with status 500")
    assert refusal(f"{server}/loop").startswith("the server redirects without end")
    # Not a file of this machine.
    assert "file:///etc/passwd" in refusal(f"{server}/away")


def test_a_body_without_end_is_read_to_the_limit_alone(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(url_images, "MAX_BYTES", 2**20)
    begin = time.monotonic()
    assert refusal(f"{server}/endless") == "larger than 1 MiB; leave it out"
    assert time.monotonic() - begin < 30
    monkeypatch.setattr(url_images, "MAX_BYTES", len(CONTENT))
    assert read_url(f"{server}/a.png") == CONTENT
    monkeypatch.setattr(url_images, "MAX_BYTES", len(CONTENT) - 1)
    assert "larger than" in refusal(f"{server}/a.png")
    fsspec.filesystem("memory").pipe("memory://large.png", CONTENT)
    assert "larger than" in refusal("memory://large.png")


def test_a_body_that_is_cut_off_is_no_image(server: str) -> None:
    assert refusal(f"{server}/cut").startswith("cannot be read (")


def test_a_server_that_does_not_answer_ends_in_time(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(url_images, "TIMEOUT", 0.5)
    for function in (read_url, open_image, is_there, images_below_url):
        begin = time.monotonic()
        assert refusal(f"{silent}/a", function) == ("no answer within 0.5 s; look whether the server can be reached")
        assert time.monotonic() - begin < 30


def test_a_server_that_is_not_there_is_told(nobody: str) -> None:
    for function in (read_url, is_there, images_below_url):
        assert "Connect call failed" in refusal(f"{nobody}/a", function)
        # By name; .invalid never has an address.
        assert "cannot be read (" in refusal("http://nowhere.invalid/a", function)


def test_images_below_a_page_are_those_that_it_and_its_own_link_to(server: str) -> None:
    found = [f"{server}/a.png", f"{server}/sub/b%20c.JPG"]
    assert images_below_url(f"{server}/") == images_below_url(server) == found
    assert images_below_url(f"{server}/sub") == images_below_url(f"{server}/sub/") == found[1:]
    for url in (f"{server}/none.png", f"{server}/a.png?token=1"):
        assert images_below_url(url) == [url]
    assert refusal(f"{server}/none/", images_below_url) == "no such file"
    assert refusal(f"{server}/none.html/", images_below_url).startswith("holds no images (AVIF, BMP, ")


def test_a_page_below_that_cannot_be_read_is_not_passed_over(server: str) -> None:
    with pytest.raises(InputError, match=f"^{server}/broken/500/: the server answers with status 500"):
        images_below_url(f"{server}/broken/")


def test_a_page_without_end_is_read_to_its_limit_alone(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(url_images, "MAX_PAGE_BYTES", 2**20)
    line = "a page larger than 1 MiB; give a list of the images' URLs instead"
    assert refusal(f"{server}/endless", images_below_url) == line


def test_links_are_read_as_browsers_read_them(server: str) -> None:
    names = [f"{server}/links/{name}" for name in ("a%20b.png", "c.png", "d&e.png", "f.png", "g.png?w=1", "h.png")]
    for page in ("links", "links/", "links/index.html"):
        assert images_below_url(f"{server}/{page}") == names


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_process_reads_too(server: str) -> None:
    assert read_url(f"{server}/a.png") == CONTENT
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=lambda: theirs.send_bytes(read_url(f"{server}/a.png")), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        process.start()
    try:
        assert ours.poll(20), "the forked process waits for a thread that it does not have"
        assert ours.recv_bytes() == CONTENT
    finally:
        process.kill()
        process.join()


# Other protocols


def test_memory_and_files_are_read_and_listed(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name in ("a.png", "deep/er/B.JPEG", "deep/notes.txt"):
        memory.pipe(f"memory://images/{name}", CONTENT)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(CONTENT)
    for root, named, absolute in (
        ("memory://images", "memory://images", "memory:///images"),
        (f"file://{tmp_path}", str(tmp_path), f"file://{tmp_path}"),
    ):
        assert read_url(f"{root}/a.png") == CONTENT
        assert is_there(f"{root}/a.png")
        assert not is_there(f"{root}/none.png")
        with pytest.raises(InputError, match=f"^{named}/none.png: no such file$"):
            read_url(f"{root}/none.png")
        assert images_below_url(root) == [f"{absolute}/a.png", f"{absolute}/deep/er/B.JPEG"]
        assert refusal(f"{root}/none", images_below_url).startswith("holds no images")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs os.mkfifo")
@pytest.mark.parametrize("scheme", ["file://", "local://"])
def test_a_pipe_is_not_waited_for(scheme: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match=r"pipe.png: a pipe or a device, not a file"):
        read_url(f"{scheme}{tmp_path}/pipe.png")
    with pytest.raises(InputError, match="a folder, not an image"):
        read_url(f"{scheme}{tmp_path}")


@pytest.mark.parametrize("function", [read_url, is_there, images_below_url])
def test_chains_and_what_is_no_url_are_refused(function, tmp_path: Path) -> None:
    for url in ("simplecache::http://x/a", "zip://a::file:///tmp/b.zip", "file:///a::b"):
        assert refusal(url, function) == ":: chains protocols, which is not taken here; give a plain URL"
    assert refusal("nonsense://a/b", function) == "cannot be read (Protocol not known: nonsense)"
    for url in ("zip:///a.zip", "simplecache:///a", "reference:///a", "http://", "http://[/a"):
        try:
            assert refusal(url, function)
        except UnavailableError as error:
            assert str(error).startswith(f"{url}: ")


def test_what_a_name_from_a_table_may_hold_stays_in_one_line(server: str) -> None:
    with pytest.raises(InputError) as refused:
        read_url(f"{server}/40\n4\x1b[31m\ud800")
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("function", [read_url, is_there, images_below_url])
def test_a_package_that_is_missing_is_named(function, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UnavailableError, match=r"^gs://bucket/a: .*gcsfs"):
        function("gs://bucket/a")
    monkeypatch.setattr(url_images, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match=r"^memory://a: URLs need fsspec: pip install 'fastmsflow\[shards\]'$"):
        function("memory://a")


# An object store


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Iterator[str]:
    """The address of an S3 server with a bucket of three images, which needs credentials."""
    pytest.importorskip("s3fs", reason="needs s3fs")
    pytest.importorskip("moto.server", reason="needs moto: pip install 'moto[server]'")
    from botocore.session import Session
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    client = Session().create_client(
        "s3", "us-east-1", endpoint_url=url, aws_access_key_id="key", aws_secret_access_key="secret"
    )
    client.create_bucket(Bucket="images")
    for i in range(3):
        client.put_object(Bucket="images", Key=f"day/{i}.png", Body=CONTENT)
    client.put_object(Bucket="images", Key="day/notes.txt", Body=b"")
    yield url
    server.stop()


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    s3fs = pytest.importorskip("s3fs", reason="needs s3fs")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    yield monkeypatch
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_store_is_read_and_listed(store: str, credentials: pytest.MonkeyPatch) -> None:
    for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("ENDPOINT_URL", store)):
        credentials.setenv(f"AWS_{name}", value)
    assert read_url("s3://images/day/0.png") == CONTENT
    assert is_there("s3://images/day/0.png")
    assert not is_there("s3://images/day/9.png")
    assert refusal("s3://images/day/9.png") == "no such file"
    assert images_below_url("s3://images/day") == [f"s3://images/day/{i}.png" for i in range(3)]
    assert images_below_url("s3://images") == images_below_url("s3://images/")
    assert refusal("s3://images/night", images_below_url).startswith("holds no images")
    assert refusal("s3://nowhere/", images_below_url) == "no such file"


def test_a_store_without_credentials_is_told(store: str, credentials: pytest.MonkeyPatch) -> None:
    credentials.setenv("AWS_ENDPOINT_URL", store)
    for function in (read_url, is_there, images_below_url):
        assert "Unable to locate credentials" in refusal("s3://images/day/0", function)


def test_a_store_that_refuses_or_does_not_answer_is_told(
    server: str, silent: str, nobody: str, credentials: pytest.MonkeyPatch
) -> None:
    credentials.setenv("AWS_ACCESS_KEY_ID", "key")
    credentials.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    credentials.setattr(url_images, "TIMEOUT", 0.5)
    import s3fs

    for url, line in ((silent, "no answer within 0.5 s"), (nobody, "")):
        credentials.setenv("AWS_ENDPOINT_URL", url)
        s3fs.S3FileSystem.clear_instance_cache()
        for function in (read_url, is_there, images_below_url):
            begin = time.monotonic()
            assert line in refusal("s3://images/a", function)
            assert time.monotonic() - begin < 30
