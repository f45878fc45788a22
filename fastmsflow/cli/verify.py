"""fastmsflow verify: compares every backend and dtype with float64."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from ..number_range import COUNT, parse_image_size
from ..recipe import DATA
from .imports import import_packages
from .options import (
    OUTPUT,
    Extractor,
    ExtractorWeights,
    OfficialClamp,
    OfficialPool,
    OfficialVariant,
    argument,
    option,
)
from .options import image_size as image_size_of
from .output import console, errors, print_error, print_json, print_line, progress_bar

if TYPE_CHECKING:
    from ..compat.numerical_check import NumericalCheck

HEADINGS = ("backend", "dtype", "|dz|", "|dlog-det|", "|dscore|", "ranks", "ms", "error", "limit")


def verify(
    *,
    checkpoint: Annotated[Path, typer.Argument(help="An official checkpoint, or one of ours (.safetensors).")],
    images: Annotated[
        list[Path] | None, argument("[IMAGES]...", "Image files or folders; without any, noise goes through the flow.")
    ] = None,
    out: Annotated[Path | None, option(OUTPUT, "File for the results as JSON.")] = None,
    max_images: Annotated[int, option(DATA, "Largest number of images.", range=COUNT)] = 32,
    extractor: Extractor = "wide_resnet50_2.tv_in1k",
    extractor_weights: ExtractorWeights = None,
    image_size: Annotated[
        str | None,
        image_size_of("Image size that the official model was trained at: N, or HxW, height times width; noise: 128."),
    ] = None,
    pool: OfficialPool = "avg",
    clamp: OfficialClamp = 1.9,
    variant: OfficialVariant = "auto",
) -> None:
    """Certifies that nothing changes but the time: every backend and dtype against float64, on a flow and its images.

    Good IMAGES that it was trained on also tell which formula an official CHECKPOINT with index permutations has.
    Exits with 1 beyond tolerance. --extractor to --variant describe an official CHECKPOINT, which does not hold them.
    """
    import_packages("torch", "timm")
    from ..compat.convert import OfficialSettings
    from ..compat.numerical_check import check_numerics
    from ..compat.state_dict_keys import check_variant
    from ..compat.verify import to_verify
    from ..files import write_json

    official = OfficialSettings(
        extractor=extractor, extractor_weights=extractor_weights, pool=pool, clamp=clamp, variant=check_variant(variant)
    )
    size = None if image_size is None else parse_image_size(str(image_size))
    given = to_verify(checkpoint, images or [], official, max_images=max_images, image_size=size)
    if given.formula_line is not None:
        style, where = ("yellow", errors) if given.formula_in_doubt else (None, console)
        print_line(given.formula_line, style, where)
    with progress_bar("comparing") as bar:
        check = check_numerics(given.flow, given.batches, given.image_size, bar)
    source = f"{check.images} images" if images else f"{check.images} times noise"
    print_line(f"{checkpoint}: {check.formula}; {source}, {check.device}")
    _print_rows(check)
    for fault in check.unavailable.values():
        print_line(f"not compared: {fault}")
    for fault in given.faults:
        print_error("skipped", fault)
    fit = given.fit and given.fit.as_dict()
    content = {"checkpoint": str(checkpoint), **check.as_dict(), "formula_fit": fit}
    if out is not None:
        write_json(out, content)
    print_json(content)
    beyond = [f"{row.backend} {row.dtype}" for row in check.rows if not row.within]
    if beyond:
        errors.print(f"[red]beyond its limit: {', '.join(beyond)}[/red]")
    if beyond or given.faults:
        raise typer.Exit(1)


def _print_rows(check: "NumericalCheck") -> None:
    table = Table(*(Column(heading, no_wrap=True) for heading in HEADINGS), box=None, padding=(0, 1, 0, 0))
    for row in check.rows:
        differences = [f"{value:.1e}" for value in (row.z, row.log_det, row.score)]
        timing = (f"{row.rank_correlation:.4f}", f"{1e3 * row.seconds:.1f}")
        limits = (f"{row.relative:.1e}", f"{row.tolerance:.0e}")
        cells = (row.backend, row.dtype, *differences, *timing, *limits)
        table.add_row(*cells, style=None if row.within else "red")
    console.print(table)
    console.print("largest differences over the images; ranks: Spearman's, by log score; ms an image", style="dim")
