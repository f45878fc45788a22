"""Shards that lie elsewhere, are damaged or are not those of their manifest: every fault is named."""

import json
import re
import shutil
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import pytest
from fsspec.registry import _registry as loaded_filesystems

from fastmsflow import InputError
from fastmsflow.data import ShardedImages, write_shards
from fastmsflow.data.shards.manifest import Manifest, Shard
from fastmsflow.data.shards.storage import ShardStorage
from fastmsflow.errors import UnavailableError
from fastmsflow.training.loaders import ShardLoader
from tests.helpers.shards import IMAGES, PER_SHARD, SIZE, numbers, refused_in_a_worker, rewritten

# Elsewhere than on a disk


@pytest.fixture
def server(jpeg_shards: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(jpeg_shards)))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_stream_over_http(workers: int, server: str, jpeg_shards: Path) -> None:
    pytest.importorskip("aiohttp", reason="needs aiohttp")
    streamed = numbers(ShardedImages(f"{server}/manifest.json", SIZE, workers=workers, verify=True), workers)
    assert streamed == numbers(ShardedImages(jpeg_shards, SIZE, workers=workers), workers)


def test_an_address_that_is_not_there_is_named(server: str) -> None:
    pytest.importorskip("aiohttp", reason="needs aiohttp")
    with pytest.raises(InputError, match=r"http://127.0.0.1:\d+/none/manifest.json: no such file"):
        ShardedImages(f"{server}/none", SIZE)
    with pytest.raises(InputError, match=r"http://127.0.0.1:9/manifest.json: cannot be read"):
        ShardedImages("http://127.0.0.1:9", SIZE)


@pytest.mark.parametrize("kind", ["file", "memory", "pipe", "manifest"])
def test_every_kind_of_address_gives_the_same(kind: str, jpeg_shards: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    if kind == "memory":
        fsspec.filesystem("memory").put(f"{jpeg_shards}/", "/set/", recursive=True)
    where = {
        "file": f"file://{jpeg_shards}",
        "memory": "memory://set",
        "pipe": f"pipe:cat {jpeg_shards}/{{}}",
        "manifest": jpeg_shards / "manifest.json",
    }[kind]
    assert numbers(ShardedImages(where, SIZE)) == numbers(ShardedImages(jpeg_shards, SIZE))


def test_addresses_that_cannot_be_read_say_so(jpeg_shards_copy: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be read \(Protocol not known: nonsense"):
        ShardedImages("nonsense://set", SIZE)
    with pytest.raises(InputError, match=r"needs a \{\} where a file's name goes"):
        ShardedImages("pipe:cat set", SIZE)
    with pytest.raises(InputError, match=r"cannot be read .*exit 1"):
        ShardedImages("pipe:false {}", SIZE)
    (jpeg_shards_copy / "000002.tar").unlink()
    with pytest.raises(InputError, match=r"000002\.tar.*: cannot be read .* after 0 of 4 images"):
        numbers(ShardedImages(f"pipe:cat {jpeg_shards_copy}/{{}} 2>/dev/null", SIZE))


def test_a_package_that_is_missing_is_named(jpeg_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    # fsspec remembers a package that another test has used.
    monkeypatch.delitem(loaded_filesystems, "s3", raising=False)
    with pytest.raises(UnavailableError, match="s3fs"):
        ShardedImages("s3://bucket/set", SIZE)
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(UnavailableError, match=r"pip install 'fastmsflow\[shards\]'"):
        ShardedImages(jpeg_shards, SIZE)


def test_a_shards_name_runs_no_command(jpeg_shards_copy: Path, tmp_path: Path) -> None:
    rewritten(jpeg_shards_copy, lambda manifest: manifest["shards"][0].update(name=f"x; touch {tmp_path}/ran; .tar"))
    with pytest.raises(InputError, match="is no name of a shard"):
        ShardedImages(f"pipe:cat {jpeg_shards_copy}/{{}}", SIZE)


# Faults


def cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:5000])


def cut_between_images(shard: Path) -> None:
    with tarfile.open(shard) as tar:
        third = tar.getmembers()[4].offset
    shard.write_bytes(shard.read_bytes()[:third])


def wrong_header(shard: Path) -> None:
    with tarfile.open(shard) as tar:
        third = tar.getmembers()[4].offset
    content = bytearray(shard.read_bytes())
    content[third : third + 20] = bytes(20)
    shard.write_bytes(content)


def padded(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes() + bytes(2**21))


def another(shard: Path) -> None:
    shutil.copy(shard.with_name("000007.tar"), shard)


def not_a_tar(shard: Path) -> None:
    shard.write_bytes(b"<html>not found</html>" * 99)


FAULTS = {
    cut: (r"cannot be read \(.*\) after 1 of 4 images", 1),
    cut_between_images: ("ends after 2 of 4 images", 2),
    wrong_header: (r"cannot be read \(bad checksum\) after 2 of 4 images", 2),
    padded: ("ends after 4 of 4 images, and goes on", 4),
    another: ("holds image 28 where 8 is expected, it is another's", 0),
    not_a_tar: (r"cannot be read \(.*\) after 0 of 4 images", 0),
    Path.unlink: ("no such file after 0 of 4 images", 0),
}


@pytest.mark.parametrize("damage", FAULTS, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("verify", [False, True], ids=["", "verified"])
def test_a_bad_shard_is_named_or_left_out_by_option(
    damage: Callable[[Path], None], verify: bool, jpeg_shards_copy: Path, tmp_path: Path
) -> None:
    message, good = FAULTS[damage]
    if verify:
        good, message = 0, message if damage is Path.unlink else "its checksum is not the manifest's"
    damage(jpeg_shards_copy / "000002.tar")

    with pytest.raises(InputError, match=rf"000002\.tar: {message}.*write the shards again"):
        numbers(ShardedImages(jpeg_shards_copy, SIZE, shuffle=False, verify=verify))

    log = tmp_path / "faults.jsonl"
    images = ShardedImages(jpeg_shards_copy, SIZE, shuffle=False, verify=verify, skip_faults=log)
    assert numbers(images) == [i for i in range(IMAGES) if not 8 + good <= i < 12]
    (line,) = map(json.loads, log.read_text().splitlines())
    assert (line["lost"], line["epoch"], line["rank"]) == (4 - good, 0, 0)
    assert re.search(message, line["fault"])


def of_manifest(shards: Path) -> tuple[Shard, ...]:
    return Manifest.read(ShardStorage(shards)).shards


@pytest.fixture
def flipped(jpeg_shards_copy: Path) -> Path:
    """One bit of an image in the third shard, which decodes all the same."""
    content = bytearray((jpeg_shards_copy / "000002.tar").read_bytes())
    content[512 + 1500] ^= 1
    (jpeg_shards_copy / "000002.tar").write_bytes(content)
    return jpeg_shards_copy


def test_a_bit_that_flipped_is_an_error_when_its_shard_has_been_read(flipped: Path) -> None:
    images = iter(ShardedImages(flipped, SIZE, shuffle=False))
    assert [item["index"] for item in islice(images, 12)] == list(range(12))
    with pytest.raises(InputError, match=r"000002\.tar: its checksum is not the manifest's, though its 4 images"):
        next(images)
    with pytest.raises(InputError, match=r"its checksum is not the manifest's \(20480 of 20480 bytes\)"):
        next(iter(ShardedImages(flipped, SIZE, shuffle=False, verify=True, shards=of_manifest(flipped)[2:])))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_flipped_bit_in_the_last_shard_that_an_epoch_needs_is_found(workers: int, flipped: Path) -> None:
    """Nobody asks a loader for a batch behind the epoch's last."""
    images = ShardedImages(flipped, SIZE, workers=workers, shuffle=False, shards=of_manifest(flipped)[:3])
    loader = ShardLoader(lambda epoch: images, 4, 3)
    with refused_in_a_worker(r"000002\.tar: its checksum"):
        list(islice(loader, 3))


def test_a_flipped_bit_that_is_skipped_loses_no_image_and_is_told(flipped: Path, tmp_path: Path) -> None:
    """Also of a shard that is gone on with in its middle."""
    log = tmp_path / "faults.jsonl"
    images = ShardedImages(flipped, SIZE, shuffle=False, skip_faults=log)
    before = [item["index"] for item in islice(images, 10) if images.seen(item) is None]
    assert not log.exists()
    images.resume(images.state())
    assert before + numbers(images) == list(range(IMAGES))
    (line,) = map(json.loads, log.read_text().splitlines())
    assert line["lost"] == 0 and "000002.tar: its checksum" in line["fault"]


def test_a_whole_shard_that_is_gone_on_with_has_the_right_checksum(jpeg_shards: Path) -> None:
    images = ShardedImages(jpeg_shards, SIZE, shuffle=False)
    before = [item["index"] for item in islice(images, 10) if images.seen(item) is None]
    images.resume(images.state())
    assert before + numbers(images) == list(range(IMAGES))


def test_a_wrong_checksum_in_the_manifest_is_found(jpeg_shards_copy: Path) -> None:
    rewritten(jpeg_shards_copy, lambda manifest: manifest["shards"][5].update(sha256="0" * 64))
    with pytest.raises(InputError, match=r"000005\.tar: its checksum is not the manifest's"):
        numbers(ShardedImages(jpeg_shards_copy, SIZE))


def test_a_damaged_image_in_a_good_shard_is_named_or_left_out(jpeg_files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "cut.jpg").write_bytes(jpeg_files[0].read_bytes()[:-400])
    write_shards([*jpeg_files[:3], tmp_path / "cut.jpg"], tmp_path / "set")
    with pytest.raises(InputError, match=r"000000\.tar: .*cut\.jpg: damaged or truncated"):
        numbers(ShardedImages(tmp_path / "set", SIZE))
    images = ShardedImages(tmp_path / "set", SIZE, shuffle=False, skip_faults=tmp_path / "faults.jsonl")
    assert numbers(images) == [0, 1, 2]
    assert "cut.jpg: damaged" in (tmp_path / "faults.jsonl").read_text()


def test_a_shard_lost_between_two_runs_moves_no_other_image(jpeg_shards_copy: Path, tmp_path: Path) -> None:
    def fresh() -> ShardedImages:
        return ShardedImages(jpeg_shards_copy, SIZE, buffer=6, skip_faults=tmp_path / "faults.jsonl")

    whole, images = numbers(fresh()), fresh()
    before = [int(item["index"]) for item in islice(images, 11) if images.seen(item) is None]
    lost = images.manifest.shards[whole[30] // PER_SHARD]
    (jpeg_shards_copy / lost.name).unlink()
    resumed = fresh()
    resumed.resume(images.state())
    after = numbers(resumed)
    gone = set(range(lost.first, lost.first + lost.images))
    assert before + after == [i for i in whole if i in before or i not in gone]


def test_an_error_in_a_worker_reaches_the_caller(jpeg_shards_copy: Path) -> None:
    (jpeg_shards_copy / "000002.tar").unlink()
    with refused_in_a_worker(r"000002\.tar: no such file"):
        numbers(ShardedImages(jpeg_shards_copy, SIZE, workers=2), workers=2)


MANIFESTS = {
    "no JSON": (lambda m: m.clear(), "no manifest of shards of format None"),
    "another format": (
        lambda m: m.update(format="fastmsflow shards 9"),
        "no manifest of shards of format 'fastmsflow shards 9'",
    ),
    "no shards": (lambda m: m.update(shards=[]), "lists no shards"),
    "wrong total": (lambda m: m.update(images=47), "says 47 images, its shards hold 46"),
    "a shard twice": (lambda m: m["shards"].insert(1, m["shards"][0]), "lists 000000.tar twice"),
    "a copied shard": (
        lambda m: m["shards"].append({**m["shards"][0], "name": "copy.tar"}),
        "000000.tar and copy.tar are the same file twice",
    ),
    "a gap": (lambda m: m["shards"].pop(3), "000004.tar begins at image 16 and has 4, expected image 12"),
    "a path": (lambda m: m["shards"][0].update(name="../000000.tar"), "is no name of a shard"),
    "an unknown field": (lambda m: m["shards"][0].update(colour=1), "no manifest of shards"),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_wrong_manifest_is_named(kind: str, jpeg_shards_copy: Path) -> None:
    change, message = MANIFESTS[kind]
    rewritten(jpeg_shards_copy, change)
    with pytest.raises(InputError, match=rf"manifest\.json: .*{message}.*; copy it again, or write the shards again"):
        ShardedImages(jpeg_shards_copy, SIZE)


def test_a_manifest_of_other_counts_than_its_shards_is_named(jpeg_shards_copy: Path) -> None:
    def shift(manifest: dict) -> None:
        manifest["shards"][-1]["images"] += 1
        manifest["images"] += 1

    rewritten(jpeg_shards_copy, shift)
    with pytest.raises(InputError, match=r"000011\.tar: ends after 2 of 3 images"):
        numbers(ShardedImages(jpeg_shards_copy, SIZE))


def test_a_folder_without_a_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"manifest\.json: no such file; give the folder or URL"):
        ShardedImages(tmp_path, SIZE)


@pytest.mark.parametrize("fault", ["removed", "cut off", "never written"])
def test_shards_without_their_manifest_are_not_taken_for_a_folder_of_images(
    fault: str, jpeg_shards_copy: Path, command, tmp_path: Path
) -> None:
    manifest = jpeg_shards_copy / "manifest.json"
    if fault == "cut off":
        manifest.write_bytes(manifest.read_bytes()[:-5])
    else:
        manifest.unlink()
    if fault == "never written":
        # The first shard's images could not be read.
        (jpeg_shards_copy / "000000.tar").unlink()
        (jpeg_shards_copy / "unfinished.jsonl").touch()
    message = "no manifest of shards" if fault == "cut off" else "the same command again goes on with it"
    for source in (jpeg_shards_copy, manifest):
        code, printed = command("train", source, "--out", tmp_path / "run")
        assert (code, f"{manifest}: no " in printed, message in printed) == (1, True, True), printed
