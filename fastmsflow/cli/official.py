"""convert, verify: the reference implementation's checkpoints."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from ..errors import InputError
from .config_file import Config
from .options import (
    AsJson,
    Extractor,
    ExtractorWeights,
    Quiet,
    app,
    console,
    errors,
    print_json,
    progress_bar,
    speak,
    warnings_in_yellow,
)


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="An official checkpoint, one of ours (.safetensors), or an interrupted run's state.ckpt.",
            metavar="FROM",
        ),
    ],
    target: Annotated[Path, typer.Argument(help="Where the other kind goes.", metavar="TO")],
    extractor: Extractor = "wide_resnet50_2.tv_in1k",
    extractor_weights: Annotated[
        str | None,
        typer.Option(help="As for `train`: taken into TO. Without them TO needs timm's, downloaded when it is used."),
    ] = None,
    image_size: Annotated[int, typer.Option(help="What the official model was trained at, N x N.")] = 512,
    pool: Annotated[str, typer.Option(help="Its pool: avg, max or none.")] = "avg",
    clamp: Annotated[float, typer.Option(help="Its clamp_alpha.")] = 1.9,
    variant: Annotated[str, typer.Option(help="FrEIA's formula: auto, 0.2 or master.")] = "auto",
    fusion_first: Annotated[
        bool, typer.Option("--fusion-first", help="Of a state.ckpt: the script's Adam lists the fusion flow first.")
    ] = False,
    config: Config = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Converts between the official checkpoint format and ours, whichever FROM is not.

    --extractor to --variant describe an official FROM, which does not hold them. An interrupted run's state.ckpt
    becomes an official checkpoint with the optimizer's state, which the published script can resume from.
    """
    speak(quiet, as_json)
    from ..compat.convert import official_to_own, own_to_official

    note = None
    if fusion_first and source.suffix != ".ckpt":
        raise InputError("--fusion-first is of a run's state.ckpt, which has an optimizer; leave it out")
    if (target.suffix == ".safetensors") == (source.suffix in (".safetensors", ".ckpt")):
        ending = ".pt" if target.suffix == ".safetensors" else ".safetensors"
        raise InputError(f"{target}: what {source.name} is converted to ends in {ending}; give such a name")
    if source.suffix == ".safetensors":
        own_to_official(source, target)
        note = (
            "without an optimizer's state: the published script can load it to test or to start from, but not resume"
            " from it; an interrupted run's state.ckpt has one"
        )
    elif source.suffix == ".ckpt":
        from ..training.resume_state import state_to_official

        state_to_official(source, target, fusion_first)
        note = "with the optimizer's state: the published script can resume from it"
    else:
        size = (image_size, image_size)
        with warnings_in_yellow():
            official_to_own(source, target, extractor, size, pool, clamp, variant, extractor_weights)
    console.print(f"{escape(str(source))} -> {escape(str(target))}", soft_wrap=True)
    if note is not None:
        console.print(note, soft_wrap=True)
    if as_json:
        print_json({"from": str(source), "to": str(target)})


@app.command()
def verify(
    checkpoint: Annotated[Path, typer.Argument(help="An official checkpoint, or one of ours (.safetensors).")],
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="Image files or folders; without any, noise goes through the flow.", metavar="[IMAGES]..."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The certificate as JSON.")] = None,
    most: Annotated[int, typer.Option(help="Images at the most.")] = 32,
    extractor: Extractor = "wide_resnet50_2.tv_in1k",
    extractor_weights: ExtractorWeights = None,
    image_size: Annotated[int | None, typer.Option(help="What it was trained at, N x N; noise: 128.")] = None,
    pool: Annotated[str, typer.Option(help="Its pool: avg, max or none.")] = "avg",
    clamp: Annotated[float, typer.Option(help="Its clamp_alpha.")] = 1.9,
    variant: Annotated[str, typer.Option(help="FrEIA's formula: auto, 0.2 or master.")] = "auto",
    config: Config = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Certifies that nothing changes but the time: every backend and dtype against float64, on a flow and its images.

    Good IMAGES that it was trained on also tell which formula an official CHECKPOINT with index permutations has.
    Exits with 1 beyond tolerance. --extractor to --variant describe an official CHECKPOINT, which does not hold them.
    """
    speak(quiet, as_json)
    from ..compat.numerical_check import check_numerics
    from ..compat.state_dict_keys import check_variant
    from ..compat.verify import Described, to_verify
    from ..files import write_json

    official = Described(extractor, extractor_weights, pool, clamp, check_variant(variant))
    given = to_verify(checkpoint, images or [], most, image_size, official)
    if given.formula_line is not None:
        if given.formula_in_doubt:
            errors.print(f"[yellow]{escape(given.formula_line)}[/yellow]", soft_wrap=True)
        else:
            console.print(escape(given.formula_line), soft_wrap=True)
    with progress_bar("comparing") as advance:
        certificate = check_numerics(given.flow, given.batches, given.image_size, advance)
    source = f"{certificate.images} images" if images else f"{certificate.images} times noise"
    console.print(f"{escape(str(checkpoint))}: {certificate.formula}; {source}, {certificate.device}", soft_wrap=True)
    headings = ("backend", "dtype", "|dz|", "|dlog-det|", "|dscore|", "ranks", "ms", "error", "limit")
    table = Table(*(Column(heading, no_wrap=True) for heading in headings), box=None, padding=(0, 1, 0, 0))
    for row in certificate.rows:
        numbers = [f"{value:.1e}" for value in (row.z, row.log_det, row.score)]
        judged = (f"{row.relative:.1e}", f"{row.tolerance:.0e}")
        rest = (f"{row.rank_correlation:.4f}", f"{1e3 * row.seconds:.1f}", *judged)
        table.add_row(row.backend, row.dtype, *numbers, *rest, style=None if row.within else "red")
    console.print(table)
    console.print("largest differences over the images; ranks: Spearman's, by log score; ms an image", style="dim")
    for fault in certificate.unavailable.values():
        console.print(f"not compared: {escape(fault)}", soft_wrap=True)
    for fault in given.faults:
        errors.print(f"[red]skipped[/red] {escape(fault)}", soft_wrap=True)
    fit = given.fit and given.fit.as_dict()
    content = {"checkpoint": str(checkpoint), **certificate.as_dict(), "formula_fit": fit}
    if out is not None:
        write_json(out, content)
    if as_json:
        print_json(content)
    beyond = [f"{row.backend} {row.dtype}" for row in certificate.rows if not row.within]
    if beyond:
        errors.print(f"[red]beyond its limit: {', '.join(beyond)}[/red]")
    if beyond or given.faults:
        raise typer.Exit(1)
