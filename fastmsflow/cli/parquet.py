"""predict --format parquet: on this machine, or on a cluster."""

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import typer
from rich.markup import escape

from ..errors import InputError, UnavailableError
from ..files import absolute, shown
from .options import console, errors, print_json, progress_bar, ready

if TYPE_CHECKING:
    from ..inference.predict_parquet import Files, Shards
    from ..inference.prediction_folder import PredictionFolder
    from ..inference.scorer import DecisionThreshold, Scorer
    from ..models.msflow import MSFlow

PER_PART = 1000
# Images that cannot be read are named up to so many.
NAMED = 4


@dataclass(frozen=True, kw_only=True)
class ParquetOptions:
    """The options of `predict` that hold for Parquet."""

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
    """Scores what has no rows yet, and tells of all rows."""
    if find_spec("pyarrow") is None:
        raise UnavailableError("Parquet needs pyarrow: pip install 'fastmsflow[shards]'")
    from ..inference.predict_parquet import setting_of
    from ..inference.prediction_folder import PredictionFolder
    from ..inference.scorer import DecisionThreshold

    begin = time.perf_counter()
    with ExitStack() as stack:
        if options.cluster is not None:
            from ..integrations.ray import check_cluster

            check_cluster(options.cluster)
        # Faults of the folder and the model are told before names are listed, and those before a cluster starts.
        folder = PredictionFolder(options.out)
        model = _model(options)
        limit = DecisionThreshold.from_calibration(model.calibration, options.false_alarms, options.threshold)
        images, skipped = _images(options)
        gpus = None
        if options.cluster is not None:
            from ..integrations.ray import connected

            gpus = stack.enter_context(connected(options.cluster, quiet=not console.is_terminal or console.quiet))
        scorer = _scorer(options, model, limit, gpus)
        stack.enter_context(folder.claimed())
        folder.begin(setting_of(scorer), on_cluster=gpus is not None)
        waiting = images.waiting(folder)
        try:
            if len(waiting):
                _score(options, folder, waiting, scorer, gpus)
        except KeyboardInterrupt as interrupt:
            # A cluster may still be writing, so its rows cannot be counted.
            rows = "" if gpus is not None else f": {folder.totals().rows} images have rows in {shown(options.out)}"
            errors.print(escape(f"interrupted{rows}; the same command goes on"), soft_wrap=True, highlight=False)
            raise typer.Exit(130) from interrupt
        finally:
            folder.remove_late()
        _tell(options, scorer, folder, skipped, len(waiting), time.perf_counter() - begin, as_json)


def _model(options: ParquetOptions) -> "MSFlow":
    """Reads the model; that of a cluster's driver scores nothing, and stays on the CPU."""
    from ..inference.batch_scorer import read_model

    model = read_model(options.model)
    return model if options.cluster is not None else ready(model)


def _scorer(options: ParquetOptions, model: "MSFlow", limit: "DecisionThreshold | None", gpus: int | None) -> "Scorer":
    """``gpus``: of the cluster, if it is one that scores."""
    import torch

    from ..inference import resolve_dtype
    from ..inference.scorer import Scorer, region_threshold

    regions = region_threshold(model.calibration, options.false_alarms)
    dtype = options.dtype
    if gpus is not None:
        device = torch.device("cuda" if gpus else "cpu")
        dtype = str(resolve_dtype(dtype, device)).removeprefix("torch.")
    return Scorer(model, limit=limit, region_threshold=regions, dtype=dtype)


def _images(options: ParquetOptions) -> "tuple[Files | Shards, list[str]]":
    """Finds what is to be scored -> it, and a line for each name that led to no images."""
    from ..data.file_search import find_images
    from ..data.shards.shard_set import is_shard_set
    from ..data.url_images import images_below_url, is_url
    from ..inference.predict_parquet import Files, Shards

    sources = options.sources
    if any(is_shard_set(source) and not _is_folder_of_images(source) for source in sources):
        if len(sources) > 1:
            raise InputError("a set of shards is scored alone; give each set a command, and an --out, of its own")
        if options.null:
            raise InputError(f"{shown(sources[0])}: a set of shards; leave out --null")
        return Shards(sources[0] if _is_remote(sources[0]) else absolute(sources[0])), []
    urls = [url for source in sources if is_url(source) for url in images_below_url(source)]
    here = [source for source in sources if not is_url(source)]
    if not here:
        return Files(list(dict.fromkeys(urls))), []
    found = find_images(here, sys.stdin.buffer, options.null, urls=True)
    return Files([*map(absolute, found.files), *dict.fromkeys([*found.urls, *urls])]), found.faults


def _is_folder_of_images(source: str) -> bool:
    """Returns whether a URL leads to images and not to shards, whose manifest is JSON."""
    from ..data.shards.storage import MANIFEST, PIPE
    from ..data.url_images import is_image, is_url, read_url

    if source.startswith(PIPE) or not is_url(source) or source.endswith(MANIFEST):
        return False
    try:
        # Some servers refuse what is not there, others have a page for it.
        return is_image(source) or not read_url(f"{source.rstrip('/')}/{MANIFEST}").lstrip().startswith(b"{")
    except InputError:
        return True


def _is_remote(source: str) -> bool:
    from ..data.shards.storage import PIPE
    from ..data.url_images import is_url

    return is_url(source) or source.startswith(PIPE)


def _score(
    options: ParquetOptions,
    folder: "PredictionFolder",
    images: "Files | Shards",
    scorer: "Scorer",
    gpus: int | None,
) -> None:
    per_part = options.images_per_part or PER_PART
    if gpus is not None:
        from ..data.url_images import is_url
        from ..integrations.ray import score_on_ray

        arguments = {
            "model": options.model if is_url(options.model) else absolute(options.model),
            "threshold": options.threshold,
            "false_alarms": options.false_alarms,
            "dtype": scorer.dtype,
        }
        score_on_ray(folder, images, arguments, batch_size=options.batch_size, images_per_part=per_part, gpus=gpus)
        return
    from ..inference.predict_parquet import score_into

    with progress_bar("scoring images", len(images), unit="images") as progress:
        score_into(
            folder,
            images,
            scorer,
            batch_size=options.batch_size,
            images_per_part=per_part,
            workers=options.workers,
            progress=progress,
        )


def _tell(
    options: ParquetOptions,
    scorer: "Scorer",
    folder: "PredictionFolder",
    skipped: list[str],
    scored: int,
    seconds: float,
    as_json: bool,
) -> None:
    totals, limit = folder.totals(), scorer.limit
    if as_json:
        result = {
            "images": totals.rows,
            "good": totals.rows - totals.faults - totals.defective if limit else None,
            "defective": totals.defective if limit else None,
            "faults": totals.faults,
            "lost": totals.lost,
            "skipped": skipped,
            "threshold": limit and limit.value,
            "region_threshold": scorer.region_threshold,
            "parts": f"{options.out}/parts",
            "scored_now": scored,
            "seconds": round(seconds, 3),
        }
        print_json(result)
    rate = f"; {scored} now, {scored / seconds:.1f} images/s" if scored else "; all were there already"
    labels = f"{totals.defective} defective; threshold {limit.text}" if limit else "no labels: no threshold"
    console.print(
        f"{totals.rows - totals.faults} of {totals.rows} images scored{rate}", highlight=False, soft_wrap=True
    )
    console.print(escape(labels), highlight=False, soft_wrap=True)
    console.print(escape(f"results in {shown(options.out)}/parts"), soft_wrap=True)
    lines = [*skipped, *(folder.faults(NAMED) if totals.faults else [])]
    if totals.faults > totals.lost + NAMED:
        more = totals.faults - totals.lost - NAMED
        lines.append(f"{more} more images that cannot be read or scored; their rows have the fault")
    for line in lines:
        errors.print(f"[red]skipped[/red] {escape(line)}", soft_wrap=True, highlight=False)
    if lines:
        raise typer.Exit(1)
