"""fastmsflow predict --format parquet: on this machine, or on a Ray cluster."""

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape

from ..calibration import DecisionThreshold, region_threshold
from ..errors import UnavailableError
from ..files import absolute, shown
from .output import console, errors, exit_if_skipped, print_json, progress_bar

if TYPE_CHECKING:
    from ..inference.prediction_folder import PredictionFolder
    from ..inference.prediction_sources import Files, Shards
    from ..inference.scorer import Scorer
    from ..models.msflow import MSFlow

IMAGES_PER_PART = 1000
FAULTS_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class ParquetOptions:
    """The options of `predict` that apply to Parquet."""

    model: str
    sources: list[str]
    null: bool
    out: str
    batch_size: int
    false_alarms: float | None
    threshold: float | None
    images_per_part: int | None
    workers: int
    dtype: str
    cluster: str | None


def predict_parquet(options: ParquetOptions, as_json: bool) -> None:
    """Scores the images that have no row yet, and prints a summary of all rows."""
    if find_spec("pyarrow") is None:
        raise UnavailableError("Parquet needs pyarrow: pip install 'fastmsflow[shards]'")
    from ..inference.batch_scorer import read_model
    from ..inference.loading import to_fastest_device
    from ..inference.predict_parquet import settings_of
    from ..inference.prediction_folder import PredictionFolder
    from ..inference.prediction_sources import find_sources

    begin = time.perf_counter()
    with ExitStack() as stack:
        if options.cluster is not None:
            from ..integrations.ray import check_cluster

            check_cluster(options.cluster)
        # Faults of the folder and the model are told before names are listed, and those before a cluster starts.
        folder = PredictionFolder(options.out)
        model = read_model(options.model)
        if options.cluster is None:
            model = to_fastest_device(model)
        decision = DecisionThreshold.from_calibration(model.calibration, options.false_alarms, options.threshold)
        images, skipped = find_sources(options.sources, sys.stdin.buffer, options.null)
        gpus = None
        if options.cluster is not None:
            from ..integrations.ray import connected

            gpus = stack.enter_context(connected(options.cluster, quiet=not console.is_terminal or console.quiet))
        scorer = _scorer(options, model, decision, gpus)
        stack.enter_context(folder.claimed())
        folder.begin(settings_of(scorer), on_cluster=gpus is not None)
        waiting = images.without_rows(folder)
        try:
            if len(waiting):
                _score(options, folder, waiting, scorer, gpus)
        except KeyboardInterrupt as interrupt:
            # A cluster may still be writing, so its rows cannot be counted.
            rows = "" if gpus is not None else f": {folder.count_rows().rows} images have rows in {shown(options.out)}"
            errors.print(escape(f"interrupted{rows}; the same command goes on"), soft_wrap=True, highlight=False)
            raise typer.Exit(130) from interrupt
        finally:
            folder.remove_late()
        _print_summary(options.out, scorer, folder, as_json, scored_now=len(waiting), begin=begin, skipped=skipped)


def _scorer(options: ParquetOptions, model: "MSFlow", decision: DecisionThreshold | None, gpus: int | None) -> "Scorer":
    """``gpus``: number of GPUs of the cluster; None: this machine scores."""
    import torch

    from ..inference import resolve_dtype
    from ..inference.scorer import Scorer

    dtype = options.dtype
    if gpus is not None:
        device = torch.device("cuda" if gpus else "cpu")
        dtype = str(resolve_dtype(dtype, device)).removeprefix("torch.")
    regions = region_threshold(model.calibration, options.false_alarms)
    return Scorer(model, decision=decision, region_threshold=regions, dtype=dtype)


def _score(
    options: ParquetOptions,
    folder: "PredictionFolder",
    images: "Files | Shards",
    scorer: "Scorer",
    gpus: int | None,
) -> None:
    images_per_part = options.images_per_part or IMAGES_PER_PART
    if gpus is not None:
        from ..data.url_images import is_url
        from ..integrations.ray import RayOptions, score_on_ray

        arguments = {
            "model": options.model if is_url(options.model) else absolute(options.model),
            "threshold": options.threshold,
            "false_alarms": options.false_alarms,
            "dtype": scorer.dtype,
        }
        ray_options = RayOptions(batch_size=options.batch_size, images_per_part=images_per_part, gpus=gpus)
        score_on_ray(folder, images, arguments, ray_options)
        return
    from ..inference.predict_parquet import score_into

    with progress_bar("scoring images", len(images), unit="images") as bar:
        score_into(
            folder,
            images,
            scorer,
            batch_size=options.batch_size,
            images_per_part=images_per_part,
            workers=options.workers,
            progress=bar,
        )


def _print_summary(
    out: str,
    scorer: "Scorer",
    folder: "PredictionFolder",
    as_json: bool,
    *,
    scored_now: int,
    begin: float,
    skipped: list[str],
) -> None:
    """Prints counts of all rows and the first faults. Raises: typer.Exit if there are faults.

    ``begin``: time.perf_counter() at the start; ``skipped``: lines for names that led to no image.
    """
    counts, decision, seconds = folder.count_rows(), scorer.decision, time.perf_counter() - begin
    scored = counts.rows - counts.faults
    if as_json:
        summary: dict[str, Any] = {
            "images": counts.rows,
            "good": scored - counts.defective if decision else None,
            "defective": counts.defective if decision else None,
            "faults": counts.faults,
            "lost": counts.lost,
            "skipped": skipped,
            "threshold": decision and decision.value,
            "region_threshold": scorer.region_threshold,
            "parts": f"{out}/parts",
            "scored_now": scored_now,
            "seconds": round(seconds, 3),
        }
        print_json(summary)
    rate = f"; {scored_now} now, {scored_now / seconds:.1f} images/s" if scored_now else "; all were there already"
    console.print(f"{scored} of {counts.rows} images scored{rate}", highlight=False, soft_wrap=True)
    labels = f"{counts.defective} defective; threshold {decision.text}" if decision else "no labels: no threshold"
    console.print(escape(labels), highlight=False, soft_wrap=True)
    console.print(escape(f"results in {shown(out)}/parts"), soft_wrap=True)
    lines = [*skipped, *(folder.faults(FAULTS_SHOWN) if counts.faults else [])]
    if counts.faults > counts.lost + FAULTS_SHOWN:
        more = counts.faults - counts.lost - FAULTS_SHOWN
        lines.append(f"{more} more images that cannot be read or scored; their rows have the fault")
    exit_if_skipped(lines)
