"""fastmsflow submit: writes the maps of MVTec AD 2's private sets for the evaluation server."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from ..errors import first_few
from ..files import shown
from .imports import import_packages
from .options import OUTPUT, Dtype, FalsePixels, Workers, argument, option
from .output import console, errors, print_error, print_json, print_line, progress_bar

if TYPE_CHECKING:
    from ..submission import SubmissionResult
    from ..submission.plan import SubmissionPlan


def submit(
    *,
    runs: Annotated[
        Path, argument("RUNS", "The folder of `train --class all`, which holds the folder of a run for each object.")
    ],
    root: Annotated[Path, argument("ROOT", "The folder of MVTec AD 2 that holds the objects: can, fabric, and so on.")],
    out: Annotated[
        Path,
        option(
            OUTPUT,
            "Folder for anomaly_images, anomaly_images_thresholded and submission.tar.gz. Called again, it goes on.",
        ),
    ] = Path("submission"),
    false_pixels: FalsePixels = None,
    workers: Workers = 0,
    dtype: Dtype = "auto",
) -> None:
    """Scores both private sets of MVTec AD 2, and packs their maps for the evaluation server.

    Each map is written as TIFF (float16, nats, the image's own size) and, thresholded, as PNG. All maps are checked
    before submission.tar.gz is packed. Exit code: 0 if it was packed, 1 if maps are missing, 130 if interrupted.
    """
    console.print("loading torch and timm ...", style="dim")
    import_packages("torch", "timm")
    from ..submission import SubmissionOptions
    from ..submission import submit as make_submission

    options = SubmissionOptions(false_pixels=false_pixels, dtype=dtype, workers=workers)
    try:
        with progress_bar("looking at images") as bar:
            result = make_submission(runs, root, out, options, planned=_print_plan, progress=bar, stage=bar.stage)
    except KeyboardInterrupt as interrupt:
        print_line("interrupted; the maps so far stay, and the same command goes on", where=errors)
        raise typer.Exit(130) from interrupt
    print_json(result.as_dict())
    _print_result(result, out)


def _print_plan(plan: "SubmissionPlan") -> None:
    for planned in plan.objects:
        name = f"{shown(planned.name)}: {len(planned.images)} images, {shown(planned.checkpoint)}"
        print_line(f"{name}, threshold of a pixel {planned.threshold}")
    for name, reason in plan.without_model.items():
        print_line(f"{shown(name)}: no model: {reason}", "yellow", errors)


def _print_result(result: "SubmissionResult", out: Path) -> None:
    """Prints the outcome of a submission in ``out``. Raises: typer.Exit with code 1 if the archive was not packed."""
    splits = list(dict.fromkeys(split for of in result.objects for split in of.images))
    marked = [Column(f"{split}: images, pixels marked", justify="right") for split in splits]
    table = Table("object", Column("threshold, nats", justify="right"), *marked)
    for of in result.objects:
        cells = [f"{of.images[split]}, {of.marked.get(split, 0):.3%}" if split in of.images else "" for split in splits]
        table.add_row(escape(shown(of.name)), f"{of.threshold:.4g}", *cells)
    console.print(table)
    if result.archive is not None:
        size = result.archive.stat().st_size / 2**20
        advice = "upload it to benchmark.mvtec.com"
        if result.differences:
            advice = "the server would not take it, since the set is not the whole published one"
        print_line(f"checked and packed: {shown(result.archive)}, {size:.1f} MiB; {advice}")
        return
    from ..submission.folder import ARCHIVE

    if result.faults:
        print_error("not packed:", f"{first_few(list(result.faults))}; mend them, and the same command goes on")
    if result.without_model:
        names = ", ".join(shown(name) for name in result.without_model)
        print_error("not packed:", f"no model of {names}; train them, and the same command goes on")
    earlier = out / ARCHIVE
    if earlier.exists():
        print_line(f"{shown(earlier)}: is of an earlier call, whose maps may differ; do not upload it", where=errors)
    raise typer.Exit(1)
