"""fastmsflow shard: packs images into tar shards."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..files import shown
from ..number_range import COUNT
from .options import IMAGE_SOURCES, OUTPUT, Null, argument, option
from .output import exit_if_skipped, print_json, print_line, progress_bar


def shard(
    *,
    images: Annotated[list[str], argument("IMAGES...", IMAGE_SOURCES)],
    out: Annotated[Path, option(OUTPUT, "Folder for the shards and their manifest.json.")],
    images_per_shard: Annotated[
        int,
        option(
            OUTPUT,
            "Images per shard. A shard should have 100 MB to 1 GB, and every GPU needs at least one.",
            range=COUNT,
        ),
    ] = 1000,
    decode: Annotated[
        bool, typer.Option("--decode", help="Decode every image to check it; by default its header is checked.")
    ] = False,
    null: Null = False,
) -> None:
    """Packs images into tar shards that are read as a stream, from a disk or a server; their bytes stay as they are.

    Images that cannot be read are named and left out. Interrupted, the same command continues after the last complete
    shard. Exit code: 0 if all images are in, 1 if any is not.
    """
    from ..data.file_search import find_images
    from ..data.shards.writer import write_shards

    found = find_images(images, sys.stdin.buffer, null)
    with progress_bar("writing shards", len(found.files)) as bar:
        manifest = write_shards(found.files, out, images_per_shard, decode=decode, progress=bar)
    skipped = [*found.faults, *manifest.skipped]
    size = f"{manifest.bytes / 1e6:.1f} MB"
    shards = len(manifest.shards)
    print_line(f"{manifest.images} images in {shards} {'shard' if shards == 1 else 'shards'}, {size}, in {shown(out)}")
    print_json(
        {
            "out": str(out),
            "shards": len(manifest.shards),
            "images": manifest.images,
            "bytes": manifest.bytes,
            "fingerprint": manifest.fingerprint,
            "skipped": skipped,
        }
    )
    exit_if_skipped(skipped)
