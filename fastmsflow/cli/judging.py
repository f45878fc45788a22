"""evaluate, calibrate: what a trained model is worth, and from where on it calls an image defective."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from ..files import shown
from .config_file import Config, resolved
from .options import (
    METRIC_NAMES,
    AsJson,
    Category,
    Dtype,
    FalseAlarms,
    ModelPath,
    Quiet,
    ScoreMap,
    Source,
    Workers,
    app,
    console,
    every_class_of,
    in_table,
    is_every_class,
    load_model,
    named,
    print_json,
    progress_bar,
    say_how_exact,
    speak,
)

if TYPE_CHECKING:
    from ..evaluation.compare_checkpoints import CheckpointComparison, CheckpointResult


@app.command()
def evaluate(
    ctx: typer.Context,
    model: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint, or the folder of a run: its last, held-out-chosen and best-on-test checkpoints side by"
            " side. With --class all: a folder with the folder of a run for each class, by its name.",
            metavar="MODEL",
        ),
    ],
    source: Source,
    category: Category = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for metrics.json, metrics.csv, scores.csv, report.html and pictures."
            " Default: evaluation, beside the checkpoint."
        ),
    ] = None,
    false_alarms: FalseAlarms = None,
    workers: Workers = 0,
    dtype: Dtype = "auto",
    score_map: ScoreMap = None,
    config: Config = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Scores the test images of SOURCE: metrics, the false-alarm rate at the threshold, a report."""
    speak(quiet, as_json)
    console.print("loading torch and timm ...", style="dim")
    from ..evaluation.compare_checkpoints import checkpoints, compare_checkpoints, mean_of, write_metrics
    from ..evaluation.score_map_store import ScoreMapStore
    from ..evaluation.test_report import write_test_report
    from ..scoring import check_map

    kind = None if score_map is None else check_map(score_map)
    every = is_every_class(source, category)
    out = out or (model if model.is_dir() else model.parent) / "evaluation"
    judged: list[CheckpointResult] = []
    seconds: Counter[str] = Counter()
    classes = every_class_of(source) if every else [category]
    for name in classes:
        # Before the first is scored, which takes its time.
        checkpoints(model / name if every and name else model)
    for name in classes:
        where, folder = (model / name, out / name) if every and name else (model, out)
        with progress_bar("reading") as bar, ScoreMapStore(folder) as maps:
            found = compare_checkpoints(
                where, source, name, false_alarms, workers, dtype, bar, bar.stage, load_model, maps, kind
            )
            judged += found.rows
            bar.stage("writing the report", len(found.images.test))
            with found.stopwatch("report"):
                metrics = {row.checkpoint: named(row.evaluation.as_shown()) for row in found.rows}
                seen = (found.test_result.scores, maps, found.test_result.pro_curve())
                write_test_report(folder, found.images, found.model, *seen, metrics, resolved(ctx), bar, kind)
        seconds.update(found.stopwatch.seconds)
        _print_threshold(found)
    if every:
        judged += mean_of(judged)
    for name in dict.fromkeys(row.name for row in judged):
        _print_metrics(name, [row for row in judged if row.name == name])
    console.print("seconds: " + ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items()), style="dim")
    write_metrics(out, judged)
    console.print(f"written to {escape(str(out))}", soft_wrap=True)
    if as_json:
        print_json({"rows": [row.as_dict() for row in judged], "seconds": seconds})


@app.command()
def calibrate(
    model: ModelPath,
    images: Annotated[
        list[Path],
        typer.Argument(help="Good images, or folders of them, that MODEL was not trained on.", metavar="IMAGES..."),
    ],
    false_alarms: Annotated[float, typer.Option(help="Share of good images that may be called defective.")] = 0.05,
    out: Annotated[Path | None, typer.Option(help="Where the calibrated model goes. Default: MODEL itself.")] = None,
    workers: Workers = 0,
    dtype: Dtype = "auto",
    config: Config = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Sets MODEL's threshold for a rate of false alarms, from good images alone."""
    speak(quiet, as_json)
    console.print("loading torch and timm ...", style="dim")
    from ..data import ImageFileDataset, list_images
    from ..evaluation.evaluate import scored
    from ..evaluation.evaluator import Calibrator
    from ..inference import prepare
    from ..models.checkpoint import read_checkpoint

    network = load_model(model)
    # The copy cannot be saved; the model that it was made from is.
    ready = prepare(network, dtype)
    # An image given twice would count as two.
    files = list(dict.fromkeys(file for path in images for file in (list_images(path) if path.is_dir() else [path])))
    calibrator = Calibrator([shown(file) for file in files])
    with progress_bar("scoring good images", len(files)) as advance:
        images_there = ImageFileDataset(files, network.image_size)
        for numbers, scores in scored([ready], images_there, workers=workers, progress=advance):
            calibrator.add(numbers, scores[0])
    network.calibration = calibrator.calibration(false_alarms)
    # Before anything is written: too few images are an error.
    threshold, region = network.calibration.threshold(), network.calibration.region_threshold()
    network.save(out or model, **read_checkpoint(model)[1].get("notes", {}))
    console.print(f"threshold of an image: {threshold}", soft_wrap=True)
    console.print(f"threshold of a region: {region}", soft_wrap=True)
    console.print(f"kept in {escape(str(out or model))}", soft_wrap=True)
    if as_json:
        print_json({"model": str(out or model), "threshold": threshold.as_dict(), "region": region.as_dict()})


def _print_threshold(found: "CheckpointComparison") -> None:
    calibration = found.model.calibration
    if calibration is None:
        console.print("not calibrated, so no threshold: `fastmsflow calibrate MODEL GOOD_IMAGES` sets one", style="dim")
    elif calibration.is_enough():
        threshold = calibration.threshold()
        good = sum(sample.label == 0 for sample in found.images.test)
        reached = found.rows[0].evaluation.false_alarm_rate
        console.print(f"threshold: {threshold}; reached on {good} good test images: {reached:.2%}", soft_wrap=True)
        doubt = threshold.doubt(round(good * (reached or 0)), good)
        if doubt is not None:
            console.print(doubt, style="yellow", soft_wrap=True)
    else:
        console.print(f"no threshold: {calibration.shortage()}", style="yellow", soft_wrap=True)


def _print_metrics(name: str, rows: list["CheckpointResult"]) -> None:
    table = Table(Column(escape(name)), *(Column(escape(row.checkpoint), justify="right") for row in rows))
    say_how_exact(table, [row.evaluation.pixel_error for row in rows])
    for metric in dict.fromkeys(metric for row in rows for metric in row.evaluation.as_shown()):
        table.add_row(METRIC_NAMES[metric], *(in_table(getattr(row.evaluation, metric)) for row in rows))
    console.print(table)
