"""Manifests and shards of strangers: what they say of themselves is believed in nothing that fills the memory."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from fastmsflow import InputError
from fastmsflow.data.image_batches import ShardBatches
from fastmsflow.data.shards.manifest import Manifest, Shard
from fastmsflow.data.shards.reader import read_shard
from fastmsflow.data.shards.shard_set import is_shard_set
from fastmsflow.data.shards.storage import ShardStorage
from tests.helpers.memory_limit import memory_limit
from tests.helpers.mutations import line_of, mutations, refused
from tests.helpers.shards import rewritten
from tests.helpers.web_servers import web_server

RAW = ("", "{", "[]", "5", "null", '"x"', "[" * 10**5, '{"a":' * 10**5, "9" * 5000)


@pytest.fixture
def frugal() -> Iterator[None]:
    with memory_limit():
        yield


def test_every_key_of_a_manifest(jpeg_shards_copy: Path) -> None:
    path = jpeg_shards_copy / "manifest.json"
    content = json.loads(path.read_text())
    for what, is_other, changed in mutations(content):
        path.write_text(json.dumps(changed))
        line = line_of(lambda: Manifest.read(ShardStorage(jpeg_shards_copy)))
        assert not is_other if line is None else line.startswith(f"{path}: "), what
        assert is_shard_set(str(jpeg_shards_copy))
    for raw in RAW:
        path.write_text(raw)
        assert "no manifest of shards (" in refused(lambda: Manifest.read(ShardStorage(jpeg_shards_copy)))
        assert is_shard_set(str(jpeg_shards_copy))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["shards"][0].update(bytes=2**62), "bytes, its shards hold"),
        (lambda content: content.update(images_per_shard=0), "has up to 0 images, and one has"),
        (lambda content: content.update(images=10**7), "says 10000000 images, its shards hold"),
        (lambda content: content["shards"][0].update(evil=1), "(shards[0].evil is not known)"),
    ],
)
def test_a_manifest_that_contradicts_itself(
    change: Callable[[Any], None], message: str, jpeg_shards_copy: Path
) -> None:
    path = jpeg_shards_copy / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    assert message in refused(lambda: Manifest.read(ShardStorage(jpeg_shards_copy)))


def tar_of(path: Path, members: Iterator[tuple[str, bytes]]) -> Shard:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return Shard(path.name, 0, 1, path.stat().st_size, "0" * 64)


def test_every_key_beside_an_image(tmp_path: Path) -> None:
    raws = [json.dumps(changed) for _, _, changed in mutations({"name": "a.jpg", "index": 0})]
    for raw in (*raws, *RAW, "{}"):
        shard = tar_of(tmp_path / "0.tar", iter([("0.jpg", b"x"), ("0.json", raw.encode())]))
        line = line_of(lambda shard=shard: list(read_shard(ShardStorage(tmp_path), shard)))
        # Any text is a name: then it is the checksum that is wrong.
        assert line is not None and line.startswith(f"{tmp_path}/0.tar: "), raw[:100]


def member(name: str, kind: bytes = b"0", size: int = 0, **more: str) -> bytes:
    """The header of a member that says what is asked for."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, more.get("linkname", "")
    return info.tobuf(tarfile.GNU_FORMAT)[:512] if len(name) < 100 else info.tobuf(tarfile.GNU_FORMAT)


def sparse() -> bytes:
    """A member of a block whose header says that it is a file of 20 GB with a hole."""
    header = bytearray(member("0.jpg", b"S", 512))
    header[386:410] = b"00000000000\0" + b"00000001000\0"
    header[483:495] = b"%011o\0" % (20 * 2**30)
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(512)


MEMBERS: dict[str, bytes] = {
    "sparse": sparse(),
    "larger than the shard": member("0.jpg", size=20 * 2**30),
    "negative": member("0.jpg")[:124] + b"\xff" * 12 + member("0.jpg")[136:],
    "a link": member("0.jpg", tarfile.SYMTYPE, linkname="/etc/passwd"),
    "a hard link": member("0.jpg", tarfile.LNKTYPE, linkname="/etc/passwd"),
    "a device": member("0.jpg", tarfile.CHRTYPE),
    "a FIFO": member("0.jpg", tarfile.FIFOTYPE),
    "a folder": member("0.jpg", tarfile.DIRTYPE),
    "a PAX header": member("pax", tarfile.XHDTYPE, 2**33),
    "a global PAX header": member("pax", tarfile.XGLTYPE, 2**33),
    "a long name": member("././@LongLink", tarfile.GNUTYPE_LONGNAME, 2**33),
    "a name of many blocks": member("n" * 10**6),
}


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("kind", MEMBERS)
def test_only_plain_members_no_larger_than_their_shard(kind: str, verify: bool, tmp_path: Path, frugal: None) -> None:
    content = MEMBERS[kind] + bytes(4096)
    (tmp_path / "0.tar").write_bytes(content)
    shard = Shard("0.tar", 0, 1, len(content), sha256(content).hexdigest())
    line = refused(lambda: list(read_shard(ShardStorage(tmp_path), shard, verify)))
    assert line.startswith(f"{tmp_path}/0.tar: ") and ("is no plain file within" in line or "checksum" in line), line


@pytest.mark.parametrize("name", ["w.tar.gz", "w.tar.bz2", "w.tar.xz"])
def test_a_compressed_shard_is_none(name: str, tmp_path: Path, frugal: None) -> None:
    with tarfile.open(tmp_path / name, f"w:{name[6:]}") as tar:
        info = tarfile.TarInfo("0.jpg")
        info.size = 2**24
        tar.addfile(info, io.BytesIO(bytes(info.size)))
    content = (tmp_path / name).rename(tmp_path / "0.tar").read_bytes()
    shard = Shard("0.tar", 0, 1, len(content), sha256(content).hexdigest())
    assert "cannot be read (" in refused(lambda: list(read_shard(ShardStorage(tmp_path), shard)))


def test_more_images_than_the_bytes_hold(jpeg_shards_copy: Path) -> None:
    def grow(manifest: dict) -> None:
        manifest["shards"][-1]["images"] += 10**7
        manifest["images"] += 10**7

    rewritten(jpeg_shards_copy, grow)
    with pytest.raises(InputError, match=r"000011\.tar has 10000002 images in 10240 bytes, which cannot be"):
        Manifest.read(ShardStorage(jpeg_shards_copy))


def test_images_that_are_lost_with_a_shard_come_in_batches(jpeg_shards_copy: Path, frugal: None) -> None:
    """A manifest says of its last shard that it had ten million images."""

    def grow(manifest: dict) -> None:
        manifest["shards"][-1].update(images=10**7, bytes=10**11)
        manifest["images"] = 44 + 10**7
        manifest["images_per_shard"] = 10**7
        manifest["bytes"] = sum(shard["bytes"] for shard in manifest["shards"])

    rewritten(jpeg_shards_copy, grow)
    batches = ShardBatches(str(jpeg_shards_copy))
    sizes, lost = set(), 0
    for batch in batches.batches(batches.manifest.shards[-1], 8):
        sizes.add(len(batch.images) + batch.lost)
        lost += batch.lost
    assert lost == 10**7 - 2 and max(sizes) <= 10


ENDLESS: dict[str, Callable[..., None]] = {
    "without a length": lambda request: request.send_response(200),
    "with a length": lambda request: (
        request.send_response(200), request.send_header("Content-Length", "100000000000")
    ),
    "for a range": lambda request: (
        request.send_response(206), request.send_header("Content-Range", "bytes 0-99999999999/100000000000")
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_manifest_without_end(kind: str, frugal: None) -> None:
    pytest.importorskip("aiohttp", reason="needs aiohttp")

    def answer(request) -> None:
        ENDLESS[kind](request)
        request.end_headers()
        try:
            while request.command == "GET":
                request.wfile.write(b" " * 2**20)
        except OSError:
            pass

    with web_server(answer) as url:
        line = refused(lambda: Manifest.read(ShardStorage(url)))
    assert line.startswith(f"{url}/manifest.json: no manifest of shards (larger than 64 MiB)")


def test_a_shard_without_end(jpeg_shards: Path, frugal: None) -> None:
    (first, *_) = Manifest.read(ShardStorage(jpeg_shards)).shards
    where = ShardStorage(f"pipe:cat {jpeg_shards}/{{}}; cat /dev/zero")
    for verify in (False, True):
        line = refused(lambda verify=verify: list(read_shard(where, first, verify)))
        assert "and goes on" in line or "its checksum is not the manifest's" in line
