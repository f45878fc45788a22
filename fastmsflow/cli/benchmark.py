"""fastmsflow benchmark: measures speed, compares results, tunes the kernels to this GPU."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from ..errors import InputError, UnavailableError
from ..number_range import above
from .options import OUTPUT, option
from .output import console, errors, print_json, print_line, progress_bar


def benchmark(
    *,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune", help="Time the kernels' tiles and convolutions on this GPU and save the fastest for this user."
        ),
    ] = False,
    out: Annotated[Path, option(OUTPUT, "File for the suite's results.")] = Path("runs/speed.json"),
    results: Annotated[
        Path | None, typer.Option(help="Results of an earlier run, which are compared instead of those of a new run.")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option("--compare", help="Older results; prints ratios and exits with 1 beyond --threshold.")
    ] = None,
    threshold: Annotated[
        float, option(None, "Largest ratio to the older time that is accepted.", range=above(0))
    ] = 1.1,
) -> None:
    """Measures speed: every contestant of the suite (from a source tree), or the kernels' tiles on this GPU."""
    if tune:
        _tune()
        return
    from ..benchmarking.compare import compare, run_suite

    if results is not None and baseline is None:
        raise InputError("--results are compared with older ones, and none were given; give --compare FILE too")
    if results is None:
        run_suite(out, console.quiet)
        results = out
    if baseline is None:
        print_json({"results": str(results)})
        return
    ratios, warnings = compare(baseline, results)
    table = Table(Column("benchmark", overflow="fold"), "before", "now", "now / before")
    for ratio in ratios:
        style = "red" if ratio.value > threshold else None
        times = (f"{1e3 * seconds:.4g} ms" for seconds in (ratio.before, ratio.now))
        table.add_row(escape(ratio.name.rpartition("::")[2]), *times, f"{ratio.value:.3f}", style=style)
    console.print(table)
    for warning in warnings:
        print_line(warning, "yellow")
    print_json([{**asdict(ratio), "now / before": ratio.value} for ratio in ratios])
    slower = sum(ratio.value > threshold for ratio in ratios)
    if slower:
        errors.print(f"[red]{slower} of {len(ratios)} are more than {threshold:g} times slower[/red]")
        raise typer.Exit(1)


def _tune() -> None:
    import torch

    if not torch.cuda.is_available():
        raise UnavailableError("--tune times kernels on a GPU, and torch sees none here")
    try:
        from ..benchmarking import TileChoice, as_table, save_table
        from ..benchmarking import tune as search
        from ..kernels import configs
    except ValueError as error:
        # The table of before is damaged; kernels know nothing of InputError.
        raise InputError(str(error)) from error

    device = torch.device("cuda", torch.cuda.current_device())
    results = []
    try:
        with progress_bar("tuning") as bar:
            for result in search(device, progress=lambda label, done, total: bar.stage(label, total, done)):
                results.append(result)
    finally:
        # The results so far are saved also after Ctrl-C.
        path = save_table(as_table(configs.chip(device), results)) if results else None
    tiles, convolutions = Table("kernel", "tile before", "tile now", "speed"), Table("convolution", "own", "vendor's")
    for r in results:
        if isinstance(r, TileChoice):
            tiles.add_row(r.kernel, str(r.before), str(r.after), f"{r.speedup:.2f}x")
        else:
            shape = f"{r.kind}, {r.pixels} pixels, {r.outputs} outputs"
            convolutions.add_row(shape, f"{r.own:.3f} ms", f"{r.vendor:.3f} ms")
    console.print(tiles, convolutions)
    print_line(f"{torch.cuda.get_device_name(device)}: kept in {path}")
    print_json({"kept in": str(path)})
