"""Forty thousand images are streamed in the memory that four thousand take."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmsflow.data.shards.manifest import Manifest, Shard

pytestmark = pytest.mark.slow

IMAGES, PER_SHARD, EARLY = 40_000, 1000, 4_000
GROWTH = 1.05
STREAM = """
import json, sys
from pathlib import Path
from fastmsflow.data import ShardedImages

def peak():
    # Not ru_maxrss: a process begins with its parent's, here pytest's.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])

peaks = {}
for count, item in enumerate(ShardedImages(sys.argv[1], (32, 32)), 1):
    if count in (int(sys.argv[2]), int(sys.argv[3])):
        peaks[count] = peak()
print(json.dumps([count, *peaks.values()]))
"""


def member(name: str, content: bytes) -> bytes:
    """A file within a tar."""
    head = tarfile.TarInfo(name)
    head.size = len(content)
    return head.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def write_set(root: Path) -> Manifest:
    """Writes what write_shards would write of one JPEG under many names, in a tenth of the time."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG", quality=10)
    content = encoded.getvalue()
    shards = []
    for first in range(0, IMAGES, PER_SHARD):
        members = []
        for index in range(first, first + PER_SHARD):
            told = json.dumps({"name": f"{index:06}.jpg", "index": index}).encode()
            members += [member(f"{index:06}.jpg", content), member(f"{index:06}.json", told)]
        data = b"".join(members) + bytes(2 * tarfile.BLOCKSIZE)
        name = f"{first // PER_SHARD:06}.tar"
        (root / name).write_bytes(data)
        shards.append(Shard(name, first, PER_SHARD, len(data), hashlib.sha256(data).hexdigest()))
    manifest = Manifest(tuple(shards), "0" * 16, PER_SHARD)
    manifest.write(root)
    return manifest


def test_memory_is_the_same_after_four_and_after_forty_thousand_images(tmp_path: Path, record_property) -> None:
    assert write_set(tmp_path).bytes < 300e6
    command = [sys.executable, "-c", STREAM, str(tmp_path), str(EARLY), str(IMAGES)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    count, early, late = json.loads(said)
    record_property("peak MiB after 4,000", early / 1024)
    record_property("peak MiB after 40,000", late / 1024)
    assert count == IMAGES
    assert late < GROWTH * early
