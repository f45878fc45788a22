"""fastmsflow evaluate: metrics of a trained model, or of all checkpoints of a run, on test images."""

from collections import Counter
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from ..calibration import NO_PIXEL_THRESHOLD
from ..files import shown
from ..owned_files import CORRUPTIONS
from ..recipe import VALIDATION
from .config_file import resolved_options
from .corruption_table import print_corruption
from .imports import import_packages
from .options import (
    OUTPUT,
    Category,
    Dtype,
    FalseAlarms,
    FalsePixels,
    Overlap,
    Scale,
    ScoreMap,
    Source,
    Tile,
    TopShare,
    Workers,
    argument,
    option,
)
from .output import add_metrics, add_pixel_error, console, format_metric, print_json, print_line, progress_bar

if TYPE_CHECKING:
    from ..evaluation.compare_checkpoints import CheckpointComparison, CheckpointResult

VERB = "evaluate"


def evaluate(
    ctx: typer.Context,
    *,
    model: Annotated[
        Path,
        argument(
            "MODEL",
            "A checkpoint, or the folder of a run, whose checkpoints are compared: last, chosen on held-out"
            " images, best on test. With --class all: a folder that holds a run's folder for each class.",
        ),
    ],
    source: Source,
    category: Category = None,
    out: Annotated[
        Path | None,
        option(
            OUTPUT,
            "Folder for metrics.json, metrics.csv, scores.csv, report.html and pictures."
            " Default: evaluation, beside the checkpoint.",
        ),
    ] = None,
    tile: Tile = None,
    overlap: Overlap = None,
    scale: Scale = None,
    top_share: TopShare = None,
    false_alarms: FalseAlarms = None,
    false_pixels: FalsePixels = None,
    corrupt: Annotated[
        str | None,
        option(
            VALIDATION,
            "light: score the test images with every checkpoint under ten changes of light too, one pass each; writes"
            " corruption.csv, corruption.json and corruptions.png.",
            metavar="light",
        ),
    ] = None,
    workers: Workers = 0,
    dtype: Dtype = "auto",
    score_map: ScoreMap = None,
) -> None:
    """Scores the test images of SOURCE: metrics, the false-alarm rate at the threshold, a report."""
    console.print("loading torch and timm ...", style="dim")
    import_packages("torch", "timm")
    from ..data.class_selection import every_class_of, is_every_class
    from ..data.light import check_corrupt
    from ..evaluation.compare_checkpoints import (
        METRICS_FILES,
        as_dicts,
        by_checkpoint,
        checkpoints,
        compare_checkpoints,
        mean_of,
        write_metrics,
    )
    from ..evaluation.corruption import (
        CORRUPTION_FILES,
        CorruptionReport,
        CorruptionResult,
        evaluate_corruptions,
        mean_over_classes,
        write_corruption,
    )
    from ..evaluation.corruption_pictures import write_pictures
    from ..evaluation.metric_labels import labeled
    from ..evaluation.report import REPORT_FILES, write_test_report
    from ..evaluation.score_map_store import ScoreMapStore
    from ..inference.tiled_models import TileOptions
    from ..result_folder import claimed_results
    from ..scoring import check_map

    check_corrupt(corrupt)
    kind = None if score_map is None else check_map(score_map)
    every_class = is_every_class(source, category)
    out = out or (model if model.is_dir() else model.parent) / "evaluation"
    results: list[CheckpointResult] = []
    changed: list[CorruptionResult] = []
    seconds: Counter[str] = Counter()
    extractors: dict[str, None] = {}
    classes = every_class_of(source) if every_class else [category]
    for name in classes:
        # A missing checkpoint is an error before the first class is scored, which takes its time.
        checkpoints(model / name if every_class and name else model)
    folders = [name for name in classes if name] if every_class else ["."]
    files = [*REPORT_FILES, CORRUPTIONS] if corrupt else REPORT_FILES
    names = [str(PurePosixPath(folder, file)) for folder in folders for file in files]
    with claimed_results(out, VERB) as new:
        new.begin([*names, *(CORRUPTION_FILES if corrupt else ()), *METRICS_FILES])
        for name, folder in zip(classes, folders, strict=True):
            with progress_bar("reading") as bar, closing(ScoreMapStore(new.unfinished)) as maps:
                comparison = compare_checkpoints(
                    model / folder,
                    source,
                    name,
                    maps=maps,
                    map_kind=kind,
                    false_alarms=false_alarms,
                    false_pixels=false_pixels,
                    tiles=TileOptions(tile, overlap, scale, top_share),
                    workers=workers,
                    dtype=dtype,
                    progress=bar,
                    stage=bar.stage,
                )
                results += [*comparison.rows, *comparison.kinds]
                images = comparison.images
                corruption = CorruptionReport()
                if corrupt:
                    corruption = evaluate_corruptions(
                        comparison, folder=new.unfinished, map_kind=kind, workers=workers, dtype=dtype, progress=bar,
                        stage=bar.stage,
                    )  # fmt: skip
                    changed += corruption.rows
                    write_pictures(new.unfinished / folder / CORRUPTIONS, corruption.pictures, comparison.model, kind)
                bar.stage("writing the report", len(images.test))
                with comparison.stopwatch("report"):
                    metrics = {row.checkpoint: labeled(row.evaluation.as_shown()) for row in comparison.rows}
                    write_test_report(
                        new.unfinished / folder, images, comparison.model, comparison.test_result, metrics=metrics,
                        settings=resolved_options(ctx), progress=bar, map_kind=kind,
                        corruption=corruption.by_checkpoint(), kinds=by_checkpoint(comparison.kinds),
                    )  # fmt: skip
            seconds.update(comparison.stopwatch.seconds)
            extractors[comparison.model.extractor.description] = None
            _print_threshold(comparison)
        if every_class:
            results += mean_of(results)
            changed += mean_over_classes(changed)
        for title in dict.fromkeys(_title(row) for row in results):
            _print_metrics(title, [row for row in results if _title(row) == title])
        print_corruption(changed)
        if corrupt:
            write_corruption(new.unfinished, changed)
        write_metrics(new.unfinished, results)
        new.finish()
    console.print("seconds: " + ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items()), style="dim")
    for extractor in extractors:
        print_line(f"extractor: {extractor}")
    print_line(f"written to {out}")
    content = {"rows": as_dicts(results), "seconds": seconds, "extractors": list(extractors)}
    print_json(content | ({"corruption": [row.as_dict() for row in changed]} if corrupt else {}))


def _print_threshold(comparison: "CheckpointComparison") -> None:
    calibration = comparison.model.calibration
    if calibration is None:
        console.print("not calibrated, so no threshold: `fastmsflow calibrate MODEL GOOD_IMAGES` sets one", style="dim")
    elif calibration.is_enough():
        threshold = calibration.threshold()
        good = sum(sample.label == 0 for sample in comparison.images.test)
        rate = comparison.rows[0].evaluation.false_alarm_rate
        print_line(f"threshold: {threshold}; reached on {good} good test images: {rate:.2%}")
        doubt = threshold.doubt(round(good * (rate or 0)), good)
        if doubt is not None:
            print_line(doubt, "yellow")
    else:
        print_line(f"no threshold: {calibration.shortage()}", "yellow")
    pixel = comparison.rows[0].pixel_threshold
    if pixel is not None:
        rate = comparison.rows[0].evaluation.false_pixel_rate
        print_line(f"pixel threshold: {pixel}; reached on the good test images: {rate:.3%}")
    elif calibration is not None:
        print_line(NO_PIXEL_THRESHOLD, "dim")


def _title(row: "CheckpointResult") -> str:
    """Returns the class and, where one is judged apart, the kind of defect."""
    return row.name if row.kind is None else f"{row.name}, {row.kind}"


def _print_metrics(title: str, rows: list["CheckpointResult"]) -> None:
    table = Table(Column(escape(shown(title))), *(Column(escape(row.checkpoint), justify="right") for row in rows))
    add_pixel_error(table, [row.evaluation.pixel_error for row in rows])
    shown_metrics = {metric for row in rows for metric in row.evaluation.as_shown()}
    add_metrics(
        table,
        {
            metric: [format_metric(getattr(row.evaluation, metric)) for row in rows]
            for metric in rows[0].evaluation.as_dict()
            if metric in shown_metrics
        },
    )
    console.print(table)
