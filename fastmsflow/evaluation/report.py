"""Writes the pictures and tables of an evaluated test set."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange

from .._version import __version__
from ..calibration import Calibration, pixel_threshold
from ..data import ImageSet, fingerprint, load_image, load_mask
from ..data.image_io import read_image
from ..files import shown, write_table
from ..models.msflow import MSFlow
from ..owned_files import GALLERY, HISTOGRAM
from ..scoring import MapKind
from ..visualization.color_scale import ColorScale
from ..visualization.html_report import IMAGE_SIDE, Report, ReportRow, write_report
from ..visualization.plots import gallery, plot_scores
from .evaluator import TestResult
from .metric_labels import METRIC_LABELS

TABLE, PAGE = "scores.csv", "report.html"
REPORT_FILES = (TABLE, HISTOGRAM, GALLERY, PAGE)
"""The names of the files that ``write_test_report`` writes."""
# The gallery shows so large a part of a large image, where a defect of a few pixels can be seen.
PART = 256
# A page of images in tiles has about so many pixels of pictures in all, which are about 20 MB.
PAGE_PIXELS = 2**26


def write_test_report(
    out: Path,
    images: ImageSet,
    model: MSFlow,
    result: TestResult,
    *,
    metrics: Mapping[str, Mapping[str, float | None]],
    settings: Mapping[str, Any],
    progress: Callable[[int], None] = lambda done: None,
    map_kind: MapKind | None = None,
    corruption: Mapping[str, Mapping[str, Mapping[str, float | None]]] | None = None,
    kinds: Mapping[str, Mapping[str, Mapping[str, float | None]]] | None = None,
) -> None:
    """Writes REPORT_FILES into ``out``.

    ``scores.png`` is a histogram; ``heatmaps.png`` shows examples from the highest to the lowest score. If the model
    has a tiling, images, maps and masks have the image's own size: ``heatmaps.png`` shows the part around each map's
    highest value, and the page shrinks pictures only as far as it would exceed PAGE_PIXELS.
    ``result``: the model's result on ``images.test``, with its maps, which are of ``map_kind``, see ColorScale.
    ``metrics``: checkpoint -> metric -> value; ``corruption``: checkpoint -> change of light -> metric -> value;
    ``kinds``: checkpoint -> kind of defect -> metric -> value.
    ``settings`` are shown in the report. ``progress`` is called with the number of images done.
    """
    scores, maps = result.scores, result.maps
    if maps is None:
        raise ValueError("a report needs the maps of its images")
    color_scale = ColorScale.from_model(model.calibration, len(model.flow.channels), kind=map_kind)
    labels = np.array([sample.label for sample in images.test])
    absolute = scores.absolute_score.numpy()
    table = zip(images.test, scores.score.tolist(), scores.log_score.tolist(), absolute.tolist(), strict=True)
    write_table(
        out / TABLE,
        ("image", "label", "kind", "score", "log_score", "absolute_score"),
        ((sample.image, sample.label, sample.kind, *values) for sample, *values in table),
    )
    plot_scores(out / HISTOGRAM, labels, absolute, f"{shown(images.name)}: image scores of the test set")

    size = model.image_size if model.tiling is None else None

    def row(i: int) -> ReportRow:
        sample = images.test[i]
        return ReportRow(
            image=sample.image,
            label=sample.label,
            kind=sample.kind,
            score=float(absolute[i]),
            pixels=_pixels(sample.image, size),
            score_map=maps[i],
            mask=load_mask(sample, size).numpy() if sample.mask is not None else None,
        )

    def rows() -> Iterator[ReportRow]:
        for i in range(len(images.test)):
            yield row(i)
            progress(i + 1)

    chosen = [*_spread(np.flatnonzero(labels == 1), absolute, 8), *_spread(np.flatnonzero(labels == 0), absolute, 4)]
    shown_rows = [row(i) if size else _around_peak(row(i)) for i in chosen]
    note = "" if size else f"; parts of {PART}x{PART} pixels around the highest value of an image"
    gallery(out / GALLERY, shown_rows, color_scale, note)
    threshold, note = _threshold(model.calibration)
    report = Report(
        title=f"{images.name}: {len(images.test)} test images",
        rows=rows(),
        heat_scale=color_scale.scale,
        heat_caption=color_scale.caption,
        threshold=threshold,
        threshold_note=note,
        region_threshold=color_scale.mark,
        versions={"fastmsflow": __version__, "torch": torch.__version__, "extractor": model.extractor.description},
        pro=result.pro_curve(),
        metrics=metrics,
        corruption=corruption or {},
        pixel_note=pixel_note(model.calibration, metrics),
        kinds=kinds or {},
        settings=settings,
        fingerprint=fingerprint(images),
        licence=images.licence,
        side=None if size else max(IMAGE_SIDE, math.isqrt(PAGE_PIXELS // len(images.test))),
    )
    write_report(out / PAGE, report)


def _around_peak(row: ReportRow) -> ReportRow:
    """Returns the part of a large image around the highest value of its map."""
    height, width = row.score_map.shape
    y, x = np.unravel_index(int(row.score_map.argmax()), row.score_map.shape)
    top, left = max(0, min(int(y) - PART // 2, height - PART)), max(0, min(int(x) - PART // 2, width - PART))
    part = np.s_[top : top + PART, left : left + PART]
    mask = None if row.mask is None else row.mask[part]
    return replace(row, pixels=row.pixels[part], score_map=row.score_map[part], mask=mask)


def _pixels(image: Path, size: tuple[int, int] | None) -> np.ndarray:
    """Returns an image's pixels (H, W, 3) uint8 at ``size``, or at its own if that is None."""
    if size is None:
        return np.asarray(read_image(image))
    pixels = rearrange(load_image(image, size), "c h w -> h w c").numpy()
    return (pixels * 255).round().astype(np.uint8)


def _threshold(calibration: Calibration | None) -> tuple[float | None, str]:
    """Returns the threshold in nats, if there is one, and a sentence on its origin or its absence."""
    if calibration is None:
        return None, "the model has no calibration"
    if not calibration.is_enough():
        return None, calibration.shortage()
    threshold = calibration.threshold()
    return threshold.value, str(threshold)


def pixel_note(calibration: Calibration | None, metrics: Mapping[str, Mapping[str, float | None]]) -> str:
    """Returns the threshold of pixels, and those of ``metrics`` that are judged at it; an empty text if there is
    none."""
    threshold = pixel_threshold(calibration)
    if threshold is None:
        return ""
    note = f"Pixel threshold: {threshold}; no defect was needed for it."
    at_threshold, at_best = METRIC_LABELS["seg_f1"], METRIC_LABELS["seg_f1_max"]
    # Sets without masks have neither.
    if not any(at_threshold in of_checkpoint for of_checkpoint in metrics.values()):
        return note
    return (
        f"{note} {at_threshold} is judged at it. {at_best} is at the best threshold for these very images, so it is"
        " optimistic."
    )


def _spread(indices: np.ndarray, score: np.ndarray, count: int) -> list[int]:
    """Returns ``count`` of ``indices``, evenly spaced from the highest score to the lowest, so that none flatters."""
    ordered = indices[np.argsort(-score[indices], kind="stable")]
    return ordered[np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int)].tolist()
