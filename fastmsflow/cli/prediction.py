"""predict, export."""

import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from ..errors import InputError
from .common import ModelPath, app, console, load_model, progress_bar

DTYPES = ("float32", "float16", "bfloat16")


@app.command()
def predict(
    model: ModelPath,
    images: Annotated[list[Path], typer.Argument(help="Image files or folders of images.", metavar="IMAGES...")],
    out: Annotated[Path, typer.Option(help="Folder for scores.csv and a heat map per image.")] = Path("predictions"),
    batch_size: Annotated[int, typer.Option(help="Images at once.")] = 8,
) -> None:
    """Scores images and writes a heat map of each."""
    from ..report.run import write_predictions

    network = load_model(model)
    with progress_bar("scoring images") as advance:
        scores, faults = write_predictions(network, images, out, batch_size, advance)
    table = Table(
        Column("image", overflow="fold"), "score", "log score", title=f"highest {min(20, len(scores))} of {len(scores)}"
    )
    for path, score, log_score in scores[:20]:
        table.add_row(escape(str(path)), f"{score:.4f}", f"{log_score:.3f}")
    console.print(table)
    console.print(f"heat maps and scores.csv in {escape(str(out))}")
    for fault in faults:
        console.print(f"[red]skipped[/red] {escape(fault)}", soft_wrap=True)
    if faults:
        raise typer.Exit(1)


@app.command()
def export(
    model: ModelPath,
    to: Annotated[
        Path, typer.Argument(help="model.onnx, or model.pt2 for a torch.export program or --compiled.", metavar="TO")
    ],
    compiled: Annotated[
        bool, typer.Option("--compiled", help="An AOTInductor package of machine code for this machine's device.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Of a compiled package: float32 or, on a GPU, float16.")] = "float32",
) -> None:
    """Writes MODEL as a graph that runs without this library, checked against it: ONNX, torch.export, AOTInductor."""
    if to.suffix not in (".onnx", ".pt2") or (compiled and to.suffix != ".pt2"):
        raise InputError(f"{to}: give a name that ends in .onnx or .pt2; a compiled package is a .pt2")
    if dtype not in DTYPES or (dtype != "float32" and not compiled):
        raise InputError(f"dtype {dtype}: float32, or with --compiled one of {', '.join(DTYPES)}")
    import torch

    from ..integrations.export import export_onnx, export_package, export_program

    network = load_model(model)
    with console.status("exporting and comparing ..."), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if compiled:
            done = export_package(network, to, getattr(torch, dtype))
        elif to.suffix == ".onnx":
            done = export_onnx(network, to)
        else:
            done = export_program(network, to)
    size = done.path.stat().st_size / 2**20
    console.print(
        f"{escape(str(model))} -> {escape(str(to))} ({size:.0f} MiB); scores differ by at most {done.difference:.0e}",
        soft_wrap=True,
    )
