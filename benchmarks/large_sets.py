"""Measures large image sets on this machine: folders listed, shards written and streamed in bounded memory.

``python benchmarks/large_sets.py [FOLDER] [--images N]`` writes N small JPEGs (100,000: 260 MB of shards) below FOLDER,
by default a temporary one, and prints times, rates and peak memory. It leaves nothing behind.
"""

import argparse
import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from fastmsflow.data import ShardedImages, list_images, write_shards

FOLDERS = 100


def peak_mib() -> float:
    # Not ru_maxrss: a process begins with its parent's.
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def stream(shards: Path, early: int) -> None:
    begin = time.perf_counter()
    for count, _ in enumerate(ShardedImages(shards, (32, 32)), 1):
        if count == early:
            before = peak_mib()
    seconds, after = time.perf_counter() - begin, peak_mib()
    print(f"streamed {count} images in {seconds:.1f} s, {count / seconds:.0f}/s, one process")
    growth = 100 * (after / before - 1)
    print(f"peak memory {before:.1f} MiB after {early}, {after:.1f} MiB after {count}: {growth:+.2f} %")


def timed_listing(root: Path) -> tuple[float, list[Path]]:
    begin = time.perf_counter()
    files = list_images(root)
    return time.perf_counter() - begin, files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--stream", action="store_true", help="only stream the shards in FOLDER: of use to this script")
    options = parser.parse_args()
    if options.stream:
        stream(options.folder, options.images // 10)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        root = Path(name)
        jpeg = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(jpeg, "JPEG", quality=10)
        (root / "one.jpg").write_bytes(jpeg.getvalue())
        for folder in range(FOLDERS):
            (root / f"images/{folder:03}").mkdir(parents=True)
        for i in range(options.images):
            # One file under many names; a file system lets it have some 65,000.
            if i % 50_000 == 0:
                (root / f"{i}.jpg").write_bytes(jpeg.getvalue())
            os.link(root / f"{i - i % 50_000}.jpg", root / f"images/{i % FOLDERS:03}/{i:06}.jpg")
        seconds, files = min(timed_listing(root / "images") for _ in range(3))
        print(f"{len(files)} files in {FOLDERS} folders: listed in {seconds:.2f} s", end=" ")
        print("(folders in the system's cache: a disk or a server adds to listing)")
        begin = time.perf_counter()
        manifest = write_shards(files, root / "shards")
        seconds = time.perf_counter() - begin
        print(
            f"wrote {manifest.images} images, {manifest.bytes / 1e6:.0f} MB in {len(manifest.shards)} shards, in"
            f" {seconds:.1f} s, {manifest.images / seconds:.0f}/s"
        )
        # Another process: this one's peak is that of writing.
        subprocess.run(
            [sys.executable, __file__, root / "shards", "--stream", "--images", str(options.images)], check=True
        )


if __name__ == "__main__":
    main()
