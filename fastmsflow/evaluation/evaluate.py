"""Scores a test set with models that share their extractor, and computes their metrics."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from ..data import ImageFileDataset, ImageSet
from ..data.datasets import Progress
from ..data.image_views import ImageView
from ..data.light import LightChange
from ..data.reader_pool import BATCH_SIZE, ReaderPool, batched, read_images
from ..inference import AUTO, prepare
from ..inference.tiled_predictor import blended_scores
from ..models.msflow import MSFlow
from ..scoring import ImageScores, MapKind, Scores, shown_map
from .evaluator import Evaluator, TestResult
from .ground_truth import GroundTruth
from .kinds import EvaluatorByKind
from .results import Evaluation
from .score_map_store import ScoreMapStore

T = TypeVar("T")


class Stopwatch:
    """Measures wall time by stage, in seconds."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._device = device

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.seconds[stage] += time.perf_counter() - started


@torch.no_grad()
def score_images(
    models: Sequence[MSFlow],
    images: ImageFileDataset,
    *,
    order: Sequence[int] | None = None,
    batch_size: int = BATCH_SIZE,
    workers: int = 0,
    progress: Progress = lambda done: None,
    stopwatch: Stopwatch | None = None,
) -> Iterator[tuple[list[int], list[Scores]]]:
    """Yields for each batch the images' numbers and the scores by each of ``models``, in float32 on the CPU.

    The models differ in their flows only, so the extractor runs once. If they have a tiling, images come one by one,
    with maps of their own size, and ``batch_size`` counts tiles. ``order``: the numbers of the images in the order
    in which they are scored; None: ascending. ``progress`` is called with the number of images done. ``stopwatch``
    measures the stages load, extractor and flow, scores included.
    """
    first = models[0]
    device = next(first.parameters()).device
    stopwatch = stopwatch or Stopwatch(device)
    if first.tiling is not None:
        numbers = list(range(len(images)) if order is None else order)
        with ReaderPool(workers) as readers:
            given = _timed(readers.map(images.to_cut(number, first.tiling) for number in numbers), stopwatch)
            scored = blended_scores(
                given, first.tiling, models, batch_size=batch_size, backend=first.flow.backend, stopwatch=stopwatch
            )
            for done, (number, by_model) in enumerate(zip(numbers, scored, strict=True), start=1):
                yield [number], [scores.to_cpu() for scores in by_model]
                progress(done)
        return
    batches = [list(batch) for batch in batched(range(len(images)) if order is None else order, batch_size)]
    done = 0
    with ReaderPool(workers) as readers:
        read = read_images(images, batches, readers, device)
        for batch in batches:
            with stopwatch("load"):
                pixels = next(read)
            with stopwatch("extractor"):
                features = first.features(pixels)
            scores: list[Scores] = []
            for model in models:
                with stopwatch("flow"):
                    scores.append(model.scores_of_features(features).to_cpu())
            yield batch, scores
            done += len(batch)
            progress(done)


def _timed(items: Iterator[T], stopwatch: Stopwatch) -> Iterator[T]:
    """Yields ``items``, whose making counts as loading."""
    while True:
        with stopwatch("load"):
            item = next(items, None)
        if item is None:
            return
        yield item


def evaluate(
    model: MSFlow,
    images: ImageSet,
    *,
    batch_size: int = BATCH_SIZE,
    workers: int = 0,
    progress: Progress = lambda done: None,
    dtype: str | None = AUTO,
) -> tuple[Evaluation, ImageScores]:
    """Scores the test images of ``images`` with ``model``, on its device, and returns its metrics and the scores.

    A copy that ``for_inference`` makes computes the scores, in ``dtype``, see fastmsflow.inference.resolve_dtype. With
    None, or if ``for_inference`` made ``model``, ``model`` itself computes them.

    Pixel metrics are exact up to 2^26 pixels, 256 images of 512x512. Larger sets, and images in tiles, whose maps have
    their own sizes, are evaluated from histograms, in constant memory, and ``Evaluation.pixel_error`` bounds the
    difference. ``workers``: processes that read images.
    ``progress`` is called with the number of images done so far.

    Raises: InputError if the set has only good or only defective test images, a file cannot be read, or ``dtype`` is
    not known, or not for this CPU.
    """
    result = evaluate_all([model], images, batch_size=batch_size, workers=workers, progress=progress, dtype=dtype)[0]
    return result.evaluation, result.scores


def evaluate_all(
    models: Sequence[MSFlow],
    images: ImageSet,
    *,
    batch_size: int = BATCH_SIZE,
    workers: int = 0,
    progress: Progress = lambda done: None,
    stopwatch: Stopwatch | None = None,
    stage: Callable[[str, int], None] = lambda what, total: None,
    maps: ScoreMapStore | None = None,
    dtype: str | None = AUTO,
    map_kind: MapKind | None = None,
    light: LightChange | None = None,
    by_kind: bool = False,
) -> list[TestResult]:
    """Evaluates models that differ in their flows only, so that the extractor runs once; see ``evaluate``.

    ``stopwatch`` measures the stages load, extractor, flow and metrics. ``stage`` is called with the label of the next
    stage and the number up to which ``progress`` then counts. ``maps`` stores the first model's maps to show, of
    ``map_kind``, see fastmsflow.scoring.shown_map. ``light`` changes every image, with noise of its own.
    ``by_kind``: each kind of defect is evaluated apart, too.
    """
    first = models[0]
    stopwatch = stopwatch or Stopwatch(next(first.parameters()).device)
    with stopwatch("load"):
        ready = [prepare(model, dtype) for model in models]
        ground_truth = GroundTruth.from_image_set(images, first.image_size if first.tiling is None else None)
    map_kind = shown_map(first.calibration is not None, map_kind)
    kind_of_evaluator = EvaluatorByKind if by_kind else Evaluator
    evaluators = [
        kind_of_evaluator(
            ground_truth,
            len(model.flow.channels),
            calibration=model.calibration,
            map_kind=map_kind,
            maps=maps if model is first else None,
        )
        for model in models
    ]
    # Images alone: the ground truth reads the masks.
    shown = [
        sample.image if light is None else ImageView(sample.image, light=light.for_image(number))
        for number, sample in enumerate(images.test)
    ]
    files = ImageFileDataset(shown, first.image_size)
    batches = score_images(
        ready, files, order=ground_truth.scoring_order, batch_size=batch_size, workers=workers, progress=progress,
        stopwatch=stopwatch,
    )  # fmt: skip
    for numbers, scores_by_model in batches:
        with stopwatch("load"):
            masks = ground_truth.load_masks(numbers) if ground_truth.has_masks else None
        with stopwatch("metrics"):
            for evaluator, scores in zip(evaluators, scores_by_model, strict=True):
                evaluator.add(numbers, scores, masks)
    stage("computing metrics", len(models))
    results: list[TestResult] = []
    for evaluator in evaluators:
        with stopwatch("metrics"):
            evaluator.complete()
            results.append(evaluator.result())
        progress(len(results))
    return results
