"""shard."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ..files import shown
from .config_file import Config
from .options import AsJson, Quiet, app, console, print_json, progress_bar, speak

errors: Console = Console(stderr=True)


@app.command()
def shard(
    images: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders (with all below them), quoted patterns such as 'day1/**/*.png', and - for a list of"
            " files and folders on standard input, one a line.",
            metavar="IMAGES...",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the shards and their manifest.json.")],
    images_per_shard: Annotated[
        int, typer.Option(min=1, help="A shard should be some 100 MB to 1 GB, and every GPU needs at least one.")
    ] = 1000,
    decode: Annotated[
        bool, typer.Option("--decode", help="Decode every image to see whether it can be; otherwise its header counts.")
    ] = False,
    null: Annotated[
        bool, typer.Option("--null", "-0", help="Names on standard input end with NUL: find -print0.")
    ] = False,
    config: Config = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Packs images into tar shards that are read as a stream, from a disk or a server; their bytes stay as they are.

    Images that cannot be read are named and left out. Interrupted, the same command goes on behind the last whole
    shard. Exit code: 0 if all images are in, 1 if any is not.
    """
    from ..data.file_search import find_images
    from ..data.shards.writer import write_shards

    speak(quiet, as_json)
    found = find_images(images, sys.stdin.buffer, null)
    with progress_bar("writing shards", len(found.files)) as advance:
        manifest = write_shards(found.files, out, images_per_shard, decode, advance)
    faults = [*found.faults, *manifest.skipped]
    console.print(
        escape(
            f"{manifest.images} images in {len(manifest.shards)} shards, {manifest.bytes / 1e6:.1f} MB, in {shown(out)}"
        ),
        soft_wrap=True,
    )
    if as_json:
        print_json(
            {
                "out": str(out),
                "shards": len(manifest.shards),
                "images": manifest.images,
                "bytes": manifest.bytes,
                "fingerprint": manifest.fingerprint,
                "skipped": faults,
            }
        )
    for fault in faults:
        errors.print(f"[red]skipped[/red] {escape(fault)}", soft_wrap=True, highlight=False)
    if faults:
        raise typer.Exit(1)
