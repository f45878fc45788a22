"""fastmsflow predict: scores images into a table with heat maps, or into Parquet files."""

import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from ..calibration import DecisionThreshold, pixel_threshold
from ..errors import InputError, UnavailableError
from ..files import shown
from ..number_range import COUNT, FINITE
from ..number_range import WORKERS as WORKERS_RANGE
from ..recipe import DATA, VALIDATION
from .imports import import_packages
from .options import (
    DISTRIBUTED,
    IMAGE_SOURCES,
    OUTPUT,
    Dtype,
    Engine,
    FalseAlarms,
    Null,
    Overlap,
    Scale,
    ScoreMap,
    Tile,
    TopShare,
    argument,
    option,
)
from .output import console, errors, exit_if_skipped, print_json, print_line, progress_bar

if TYPE_CHECKING:
    from ..inference.predictor import Predictor

ROWS_SHOWN = 20
WORKERS, IMAGES_PER_PART = 2, 1000


def predict(
    *,
    model: Annotated[
        str,
        argument(
            "MODEL", "A checkpoint that `train` or `convert` wrote; for parquet also its URL, or a model's folder."
        ),
    ],
    images: Annotated[
        list[str],
        argument(
            "IMAGES...",
            f"{IMAGE_SOURCES} For parquet also URLs of images or of folders of them, and a set of shards: its folder, a"
            " URL, or 'pipe:COMMAND' with {} for a file's name.",
        ),
    ],
    out: Annotated[
        str, option(OUTPUT, "Folder for the scores and the heat maps; for parquet also a URL: s3://, gs://.")
    ] = "predictions",
    batch_size: Annotated[int, option(DATA, "Images, or tiles, in a batch.", range=COUNT)] = 8,
    tile: Tile = None,
    overlap: Overlap = None,
    scale: Scale = None,
    top_share: TopShare = None,
    false_alarms: FalseAlarms = None,
    threshold: Annotated[
        float | None,
        option(
            VALIDATION,
            "Absolute scores above it, in nats, are defective. Default: the calibrated threshold.",
            range=FINITE,
        ),
    ] = None,
    table: Annotated[
        str,
        option(
            OUTPUT,
            "Format of the scores: csv; jsonl, which lists every region; or parquet, for millions of images: a"
            " folder of files that grows, without heat maps.",
            "--format",
        ),
    ] = "csv",
    heat_maps: Annotated[
        bool | None,
        option(OUTPUT, "Write a heat map of each image, or none. Default: write them, except with parquet."),
    ] = None,
    score_map: ScoreMap = None,
    images_per_part: Annotated[
        int | None,
        option(
            OUTPUT,
            "parquet: rows per file; a cluster that reads shards writes at least so many. Default: 1000.",
            range=COUNT,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        option(DATA, "Processes that read images; a cluster has its own. Default: 2.", range=WORKERS_RANGE),
    ] = None,
    dtype: Dtype = "auto",
    engine: Engine = "torch",
    cluster: Annotated[
        str | None,
        option(
            DISTRIBUTED,
            "parquet: score by Ray. ray: on all GPUs, or processors, of this machine or of the cluster that it"
            " has joined; ray://ADDRESS:10001: on that cluster. All machines must see MODEL, IMAGES and OUT alike.",
            metavar="CLUSTER",
        ),
    ] = None,
    null: Null = False,
) -> None:
    """Scores images; labels them by a threshold; writes a table, highest score first, and a heat map of each.

    Images that cannot be read are named and left out. Exit code: 0 if all were scored, 1 if any was not, 130 if
    interrupted. Until all images are scored, results are in OUT/unfinished, and earlier ones in OUT stay as they were.

    With --format parquet every image has a row; the row of an image that cannot be read has the reason. Images that
    have a row are left out: the same command, started again, continues. Read: pandas.read_parquet("OUT/parts"), or any
    other reader of Parquet.
    """
    if cluster is not None and workers is not None:
        raise InputError("--workers: these are this machine's, and a cluster has its own; leave it out")
    workers = WORKERS if workers is None else workers
    if score_map is not None and (table == "parquet" or heat_maps is False):
        raise InputError("--map is of heat maps, and none are written here; leave it out")
    if table == "parquet":
        if heat_maps:
            raise InputError("--heat-maps: --format parquet writes none; score those images again with --format csv")
        if find_spec("pyarrow") is None:
            raise UnavailableError("Parquet needs pyarrow: pip install 'fastmsflow[shards]'")
        import_packages("torch", "timm")
        from ..inference.tiled_models import TileOptions
        from .predict_parquet import predict_parquet

        predict_parquet(
            model=model,
            tiles=TileOptions(tile, overlap, scale, top_share),
            sources=images,
            null=null,
            out=out,
            batch_size=batch_size,
            false_alarms=false_alarms,
            threshold=threshold,
            images_per_part=IMAGES_PER_PART if images_per_part is None else images_per_part,
            workers=workers,
            dtype=dtype,
            engine=engine,
            cluster=cluster,
        )
        return
    flags = {"--images-per-part": images_per_part, "--cluster": cluster}
    _refuse_parquet_options(table, model, [*images, out], flags)
    import_packages("torch", "timm")
    from ..data.file_search import find_images
    from ..inference.loading import load_model
    from ..inference.predictor import Interrupted, Predictor
    from ..inference.tiled_models import TileOptions, retile
    from ..scoring import check_map

    kind = None if score_map is None else check_map(score_map)
    found = find_images(images, sys.stdin.buffer, null)
    tiles = TileOptions(tile, overlap, scale, top_share)
    network = retile(load_model(model), tiles)
    decision = DecisionThreshold.from_calibration(network.calibration, false_alarms, threshold)
    predictor = Predictor(
        network,
        Path(out),
        table=table,
        decision=decision,
        false_alarms=false_alarms,
        pictures=heat_maps is not False,
        dtype=dtype,
        kind=kind,
        engine=engine,
        batch_size=batch_size,
    )
    try:
        with progress_bar("scoring images", len(found.files)) as bar:
            predictor.run(found.files, workers, bar)
    except Interrupted as interrupted:
        print_line(str(interrupted), where=errors)
        raise typer.Exit(130) from interrupted
    skipped = [*found.faults, *predictor.faults]
    labels = [image.defective for image in predictor.scored]
    pixel = pixel_threshold(network.calibration)
    print_json(
        {
            "images": len(labels),
            "good": labels.count(False) if decision else None,
            "defective": labels.count(True) if decision else None,
            "skipped": skipped,
            "threshold": decision and decision.value,
            "pixel_threshold": pixel and pixel.value,
            "region_threshold": predictor.color_scale.region_threshold,
            "extractor": network.extractor.description,
            "scores": str(predictor.table),
            "heat_maps": str(Path(out)) if predictor.draws else None,
        }
    )
    print_line(f"extractor: {network.extractor.description}")
    _print_scores(predictor, decision, no_labels(shown(model), network.calibration is not None, tiles.command))
    exit_if_skipped(skipped)


def _refuse_parquet_options(table: str, model: str, places: Sequence[str], flags: Mapping[str, object]) -> None:
    """Raises InputError if the table's format is not known, or something is given that only Parquet takes.

    ``places``: the images and the folder of results; ``flags``: options for Parquet alone.
    """
    if table not in ("csv", "jsonl"):
        raise InputError(f"format {table}: give csv, jsonl or parquet")
    from ..data.shards.shard_set import is_shard_set
    from ..data.url_images import is_url

    given = {
        model: is_url(model),
        **{flag: value is not None for flag, value in flags.items()},
        **{place: is_shard_set(place) for place in places},
    }
    for name, is_given in given.items():
        if is_given:
            raise InputError(f"{shown(name)}: this needs --format parquet; add that, or leave it out")


def no_labels(model: str, calibrated: bool, tiles: str) -> str:
    """Returns the line that says why there are no labels; ``tiles``: the options of tiles, each after a space."""
    remedy = (
        "calibrate it with more good images, or give --false-alarms"
        if calibrated
        else f"calibrate it with `fastmsflow calibrate MODEL GOOD_IMAGES{tiles}`"
    )
    fact = f"{model} has no threshold{' for these tiles' if tiles and not calibrated else ''}"
    return f"no labels: {fact}; {remedy}, or give --threshold"


def _print_scores(predictor: "Predictor", decision: DecisionThreshold | None, unlabeled: str) -> None:
    scored = sorted(predictor.scored, key=lambda image: image.absolute_score, reverse=True)
    table = Table(
        Column("image", overflow="fold"),
        Column("score, nats", justify="right"),
        Column("published score", justify="right"),
        "label",
        title=f"highest {min(ROWS_SHOWN, len(scored))} of {len(scored)}",
    )
    for image in scored[:ROWS_SHOWN]:
        label = {True: "[red]defective[/red]", False: "good", None: ""}[image.defective]
        table.add_row(escape(shown(image.image)), f"{image.absolute_score:.3f}", f"{image.score:.4f}", label)
    console.print(table)
    if decision is None:
        line = unlabeled
    else:
        defective = sum(image.defective is True for image in scored)
        line = f"{defective} of {len(scored)} defective; threshold {decision.text}"
    print_line(line)
    written = f"heat maps ({predictor.color_scale.kind}) and " if predictor.draws else ""
    print_line(f"{written}{predictor.table.name} in {shown(predictor.table.parent)}")
