"""predict, export."""

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from ..errors import InputError
from ..files import shown
from .config_file import Config
from .options import (
    AsJson,
    Dtype,
    FalseAlarms,
    ModelPath,
    Quiet,
    ScoreMap,
    app,
    console,
    errors,
    load_model,
    print_json,
    progress_bar,
    speak,
)
from .parquet import ParquetOptions, predict_parquet

if TYPE_CHECKING:
    from ..inference.predictor import Predictor
    from ..inference.scorer import DecisionThreshold

DTYPES = ("float32", "float16", "bfloat16")
SHOWN = 20
WORKERS = 2


@app.command()
def predict(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="A checkpoint that `train` or `convert` wrote; for parquet also its URL, or a model's folder.",
            metavar="MODEL",
        ),
    ],
    images: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders (with all below them), quoted patterns such as 'day1/**/*.png', and - for a list of"
            " files and folders on standard input, one a line. For parquet also URLs of images or of folders of them,"
            " and a set of shards: its folder, a URL, or 'pipe:COMMAND' with {} for a file's name.",
            metavar="IMAGES...",
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            help="Folder for the scores, and for a heat map of each image; for parquet also a URL: s3://, gs://."
        ),
    ] = "predictions",
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 8,
    false_alarms: FalseAlarms = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Absolute scores above it, in nats, are defective. Default: the calibrated threshold."),
    ] = None,
    table: Annotated[
        str,
        typer.Option(
            "--format",
            help="The scores' format: csv; jsonl, which has every region; or parquet, for images by the million: a"
            " folder of files that are written one by one, without heat maps.",
        ),
    ] = "csv",
    heat_maps: Annotated[
        bool | None,
        typer.Option(help="Write a heat map of each image, or none. Default: they are written, except with parquet."),
    ] = None,
    score_map: ScoreMap = None,
    images_per_part: Annotated[
        int | None,
        typer.Option(
            help="parquet: each file of results has so many rows; a cluster that reads shards writes at least so many."
            " Default: 1000.",
            min=1,
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that read images; a cluster has its own. Default: 2.", min=0)
    ] = None,
    dtype: Dtype = "auto",
    cluster: Annotated[
        str | None,
        typer.Option(
            help="parquet: score by Ray. ray: on all GPUs, or processors, of this machine, or of the cluster that it"
            " has joined; ray://ADDRESS:10001: on that one. MODEL, IMAGES and OUT must be the same for all machines.",
            metavar="CLUSTER",
        ),
    ] = None,
    null: Annotated[
        bool, typer.Option("--null", "-0", help="Names on standard input end with NUL: find -print0.")
    ] = False,
    config: Config = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Scores images; labels them by a threshold; writes a table, highest score first, and a heat map of each.

    Images that cannot be read are named and left out. Exit code: 0 if all were scored, 1 if any was not, 130 if
    interrupted. Until all are through, results are in OUT/unfinished, and earlier ones in OUT stay as they were.

    With --format parquet every image has a row; one that cannot be read, with its fault. Images that have a row are
    left out: the same command, started again, goes on. Read: pandas.read_parquet("OUT/parts"), or any other reader of
    Parquet.
    """
    if cluster is not None and workers is not None:
        raise InputError("--workers: these are this machine's, and a cluster has its own; leave it out")
    readers = WORKERS if workers is None else workers
    if score_map is not None and (table == "parquet" or heat_maps is False):
        raise InputError("--map is of heat maps, and none are written here; leave it out")
    if table == "parquet":
        if heat_maps:
            raise InputError("--heat-maps: --format parquet writes none; score those images again with --format csv")
        speak(quiet, as_json)
        options = ParquetOptions(
            model=model,
            sources=images,
            null=null,
            out=out,
            batch_size=batch_size,
            false_alarms=false_alarms,
            threshold=threshold,
            images_per_part=images_per_part,
            workers=readers,
            dtype=dtype,
            cluster=cluster,
        )
        predict_parquet(options, as_json)
        return
    _refuse_parquet_options(table, model, [*images, out], images_per_part, cluster)
    folder = Path(out)
    heat_maps = heat_maps is not False
    from ..data.file_search import find_images
    from ..inference.predictor import Interrupted, Predictor
    from ..inference.scorer import DecisionThreshold
    from ..scoring import check_map

    speak(quiet, as_json)
    kind = None if score_map is None else check_map(score_map)
    found = find_images(images, sys.stdin.buffer, null)
    network = load_model(model)
    limit = DecisionThreshold.from_calibration(network.calibration, false_alarms, threshold)
    predictor = Predictor(network, folder, table, limit, false_alarms, heat_maps, dtype, kind)
    try:
        with progress_bar("scoring images", len(found.files)) as advance:
            predictor.run(found.files, batch_size, readers, advance)
    except Interrupted as interrupted:
        errors.print(escape(str(interrupted)), soft_wrap=True)
        raise typer.Exit(130) from interrupted
    faults = [*found.faults, *predictor.faults]
    if as_json:
        print_json(_summary(predictor, limit, folder if heat_maps else None, faults))
    _print_scores(predictor, limit, model, network.calibration is not None)
    for fault in faults:
        errors.print(f"[red]skipped[/red] {escape(fault)}", soft_wrap=True, highlight=False)
    if faults:
        raise typer.Exit(1)


def _refuse_parquet_options(
    table: str, model: str, places: list[str], images_per_part: int | None, cluster: str | None
) -> None:
    """``places``: the images and the folder of results."""
    if table not in ("csv", "jsonl"):
        raise InputError(f"format {table}: give csv, jsonl or parquet")
    from ..data.shards.shard_set import is_shard_set
    from ..data.url_images import is_url

    given = {
        model: is_url(model),
        "--images-per-part": images_per_part is not None,
        "--cluster": cluster is not None,
        **{place: is_shard_set(place) for place in places},
    }
    for what, is_given in given.items():
        if is_given:
            raise InputError(f"{shown(what)}: this needs --format parquet; add that, or leave it out")


def _print_scores(predictor: "Predictor", limit: "DecisionThreshold | None", model: str, calibrated: bool) -> None:
    scored = sorted(predictor.scored, key=lambda one: one.absolute_score, reverse=True)
    table = Table(
        Column("image", overflow="fold"),
        Column("score, nats", justify="right"),
        Column("published score", justify="right"),
        "label",
        title=f"highest {min(SHOWN, len(scored))} of {len(scored)}",
    )
    for one in scored[:SHOWN]:
        label = {True: "[red]defective[/red]", False: "good", None: ""}[one.defective]
        table.add_row(escape(shown(one.image)), f"{one.absolute_score:.3f}", f"{one.score:.4f}", label)
    console.print(table)
    if limit is None:
        remedy = (
            "calibrate it with `fastmsflow calibrate MODEL GOOD_IMAGES`"
            if not calibrated
            else ("calibrate it with more good images, or give --false-alarms")
        )
        line = f"no labels: {shown(model)} has no threshold; {remedy}, or give --threshold"
    else:
        defective = sum(one.defective is True for one in scored)
        line = f"{defective} of {len(scored)} defective; threshold {limit.text}"
    console.print(escape(line), soft_wrap=True, highlight=False)
    what = f"heat maps ({predictor.heat.kind}) and " if predictor.paints else ""
    console.print(escape(f"{what}{predictor.table.name} in {shown(predictor.table.parent)}"), soft_wrap=True)


def _summary(
    predictor: "Predictor", limit: "DecisionThreshold | None", heat_maps: Path | None, faults: list[str]
) -> dict[str, Any]:
    labels = [one.defective for one in predictor.scored]
    return {
        "images": len(labels),
        "good": labels.count(False) if limit else None,
        "defective": labels.count(True) if limit else None,
        "skipped": faults,
        "threshold": limit and limit.value,
        "region_threshold": predictor.heat.region_threshold,
        "scores": str(predictor.table),
        "heat_maps": heat_maps and str(heat_maps),
    }


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
    config: Config = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Writes MODEL as a graph that runs without this library, checked against it: ONNX, torch.export, AOTInductor."""
    speak(quiet, as_json)
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
    if as_json:
        print_json(
            {"from": str(model), "to": str(to), "bytes": done.path.stat().st_size, "difference": done.difference}
        )
