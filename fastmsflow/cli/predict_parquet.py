"""fastmsflow predict --format parquet: on this machine, or on a Ray cluster."""

import sys
import time
from contextlib import ExitStack, redirect_stdout

import torch
import typer

from ..calibration import DecisionThreshold, pixel_threshold, region_threshold
from ..data.url_images import is_url
from ..files import absolute, shown
from ..inference import resolve_dtype
from ..inference.engines import OPENVINO
from ..inference.loading import read_model, to_device
from ..inference.predict_parquet import score_into, settings_of
from ..inference.prediction_folder import FAULTS_SHOWN, PredictionFolder, RowCounts
from ..inference.prediction_sources import find_sources
from ..inference.scorer import Scorer
from ..inference.tiled_models import TileOptions, retile
from ..integrations.ray import RayOptions, check_cluster, connected, score_on_ray
from .output import console, errors, exit_if_skipped, print_json, print_line, progress_bar


def predict_parquet(
    *,
    model: str,
    tiles: TileOptions,
    sources: list[str],
    null: bool,
    out: str,
    batch_size: int,
    false_alarms: float | None,
    threshold: float | None,
    images_per_part: int,
    workers: int,
    dtype: str,
    engine: str,
    cluster: str | None,
) -> None:
    """Scores the images that have no row yet, and prints a summary of all rows; the arguments: see ``predict``."""
    begin = time.perf_counter()
    with ExitStack() as stack:
        # Faults of the folder and the model are told before names are listed, and those before a cluster starts.
        if cluster is not None:
            check_cluster(cluster)
        folder, network, gpus = PredictionFolder(out), read_model(model), 0
        if cluster is None:
            network = to_device(network)
        network = retile(network, tiles)
        decision = DecisionThreshold.from_calibration(network.calibration, false_alarms, threshold)
        images, skipped = find_sources(sources, sys.stdin.buffer, null)
        if cluster is not None:
            # Ray prints warnings on standard output, where JSON is to stand alone.
            stack.enter_context(redirect_stdout(sys.stderr))
            gpus = stack.enter_context(connected(cluster, quiet=not console.is_terminal or console.quiet))
            if engine == OPENVINO:
                gpus = 0
            else:
                dtype = str(resolve_dtype(dtype, torch.device("cuda" if gpus else "cpu"))).removeprefix("torch.")
        regions = region_threshold(network.calibration, false_alarms)
        # On a cluster this process scores nothing, so its CPU need not have units for the dtype.
        own_dtype = dtype if cluster is None else "float32"
        scorer = Scorer(
            network, decision=decision, region_threshold=regions, dtype=own_dtype, engine=engine, tiles=batch_size
        )
        settings = settings_of(scorer) | ({} if cluster is None else {"dtype": dtype})
        stack.enter_context(folder.claimed())
        folder.begin(settings, on_cluster=cluster is not None)
        waiting = images.without_rows(folder)
        try:
            if len(waiting) and cluster is not None:
                path = model if is_url(model) else absolute(model)
                arguments = {
                    "model": path, "threshold": threshold, "false_alarms": false_alarms, "dtype": dtype,
                    "engine": engine, **tiles._asdict(),
                }  # fmt: skip
                options = RayOptions(batch_size=batch_size, images_per_part=images_per_part, gpus=gpus)
                score_on_ray(folder, waiting, arguments, options)
            elif len(waiting):
                with progress_bar("scoring images", len(waiting), unit="images") as bar:
                    score_into(
                        folder, waiting, scorer, batch_size=batch_size, images_per_part=images_per_part,
                        workers=workers, progress=bar,
                    )  # fmt: skip
        except KeyboardInterrupt as interrupt:
            # A cluster may still be writing, so its rows cannot be counted.
            rows = "" if cluster is not None else f": {folder.count_rows().rows} images have rows in {shown(out)}"
            print_line(f"interrupted{rows}; the same command goes on", where=errors)
            raise typer.Exit(130) from interrupt
        finally:
            folder.remove_late()
        counts, seconds = folder.count_rows(), time.perf_counter() - begin
    scored = counts.rows - counts.faults
    pixel = pixel_threshold(network.calibration)
    print_json(
        {
            "images": counts.rows,
            "good": scored - counts.defective if decision else None,
            "defective": counts.defective if decision else None,
            "faults": counts.faults,
            "lost": counts.lost,
            "skipped": skipped,
            "threshold": decision and decision.value,
            "pixel_threshold": pixel and pixel.value,
            "region_threshold": scorer.region_threshold,
            "extractor": network.extractor.description,
            "parts": f"{out}/parts",
            "scored_now": len(waiting),
            "seconds": round(seconds, 3),
        }
    )
    rate = (
        f"; {len(waiting)} now, {len(waiting) / seconds:.1f} images/s" if len(waiting) else "; all were there already"
    )
    print_line(f"{scored} of {counts.rows} images scored{rate}")
    labels = f"{counts.defective} defective; threshold {decision.text}" if decision else "no labels: no threshold"
    print_line(labels)
    print_line(f"extractor: {network.extractor.description}")
    print_line(f"results in {shown(out)}/parts")
    exit_if_skipped([*skipped, *_fault_lines(counts)])


def _fault_lines(counts: RowCounts) -> list[str]:
    more = counts.faults - counts.lost - FAULTS_SHOWN
    unnamed = [f"{more} more images that cannot be read or scored; their rows have the fault"] if more > 0 else []
    return [*counts.first_faults, *unnamed]
