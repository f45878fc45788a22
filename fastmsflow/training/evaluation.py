"""Scores of a test set -> metrics."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch

from ..calibration import Calibration
from ..checkpoint import summary
from ..data import ImageSet, LooseImages, load_mask
from ..errors import InputError
from ..files import shown
from ..metrics import aupro, auroc, binned_aupro
from ..model import MSFlow
from ..scoring import Scores, additive_score_map, score_log_likelihoods
from .features import Images, Progress


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one model on one test set, in [0, 1]. None where the set has no masks, or the model no threshold."""

    image_auroc: float
    """Of the published image score."""
    image_auroc_log: float
    """Of the image score in log space."""
    image_auroc_absolute: float
    """Of the absolute image score."""
    pixel_auroc: float | None = None
    """Of the additive maps."""
    aupro: float | None = None
    """Exact, of the multiplicative maps 1 - exp(L), up to a false-positive rate of 0.3."""
    aupro_binned: float | None = None
    """Of the same maps as the reference implementation and most of the literature approximate it: 800 thresholds."""
    aupro_log: float | None = None
    """Exact, of -L: the same order of pixels, without the ties where exp(L) underflows."""
    false_alarm_rate: float | None = None
    """Share of the good test images above the calibrated threshold of the absolute score."""
    recall: float | None = None
    """Share of the defective ones above it."""
    f1: float | None = None
    """Harmonic mean of recall and precision at it."""

    def as_dict(self) -> dict[str, float | None]:
        """Metric -> value."""
        return asdict(self)


METRICS: tuple[str, ...] = tuple(field.name for field in fields(Evaluation))
# Those at a threshold are not for choosing an epoch by.
RANKING_METRICS = METRICS[: METRICS.index("false_alarm_rate")]


@dataclass(frozen=True)
class Truth:
    """Labels (N,) of a test set, its masks (N, H, W) where it has them, and its files' names."""

    labels: np.ndarray
    masks: np.ndarray | None
    names: Sequence[str]

    @classmethod
    def of(cls, images: ImageSet, image_size: tuple[int, int]) -> "Truth":
        labels = np.array([sample.label for sample in images.test])
        defective = int(labels.sum())
        if defective in (0, len(labels)):
            raise InputError(
                f"{images.name}: evaluating needs good and defective test images;"
                f" it has {len(labels) - defective} good and {defective} defective: add the missing ones, or, to train"
                " without an evaluation, move the test images elsewhere"
            )
        masks = None
        if images.has_masks:
            masks = np.stack([load_mask(sample, image_size).numpy() for sample in images.test])
        return cls(labels, masks, [shown(sample.image) for sample in images.test])

    def judge(self, scores: Scores, calibration: Calibration | None = None) -> Evaluation:
        """``scores``: of the whole test set, on the CPU, in its order. Errors: InputError naming the images whose score
        is not finite."""
        _check_finite(scores, self.names)
        pixel = {}
        if self.masks is not None:
            multiplicative = scores.score_map_mul.numpy()
            pixel = {
                "pixel_auroc": auroc(self.masks, additive_score_map(scores.likelihood_add)),
                "aupro": aupro(self.masks, multiplicative),
                "aupro_binned": binned_aupro(self.masks, multiplicative),
                "aupro_log": aupro(self.masks, -scores.log_likelihood),
            }
        return Evaluation(
            auroc(self.labels, scores.score),
            auroc(self.labels, scores.log_score),
            auroc(self.labels, scores.absolute_score),
            **pixel,
            **self._at_threshold(scores.absolute_score.numpy(), calibration),
        )

    def _at_threshold(self, scores: np.ndarray, calibration: Calibration | None) -> dict[str, float]:
        if calibration is None or not calibration.is_enough():
            return {}
        called = scores > calibration.threshold().value
        hits = int((called & (self.labels == 1)).sum())
        defective = int((self.labels == 1).sum())
        return {
            "false_alarm_rate": float(called[self.labels == 0].mean()),
            "recall": hits / defective,
            "f1": 2 * hits / (defective + int(called.sum())),
        }


def joined(batches: Iterable[Scores]) -> Scores:
    """All of them as one, float32 on the CPU."""
    return Scores(*(torch.cat([t.float().cpu() for t in parts]) for parts in zip(*batches, strict=True)))


def _check_finite(scores: Scores, names: Sequence[str]) -> None:
    finite = scores.absolute_score.isfinite().tolist()
    faults = [name for name, fine in zip(names, finite, strict=True) if not fine]
    if faults:
        raise InputError(
            f"the score is not finite of {summary(faults)}; look at them, or for where the model overflows"
        )


def calibrated(scores: Scores, names: Sequence[str], false_alarms: float) -> Calibration:
    """From the ``scores`` of held-out good images. Errors: InputError naming those whose score is not finite."""
    _check_finite(scores, names)
    maps = scores.absolute_map
    peaks = maps.amax(dim=(1, 2))
    # Of some millions of pixels a sample does.
    pixels = maps.flatten()[:: max(1, maps.numel() // 1_000_000)]
    return Calibration(
        tuple(scores.absolute_score.tolist()), tuple(peaks.tolist()), pixels.median().item(), false_alarms
    )


class Stopwatch:
    """Wall time by stage, in seconds."""

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
def scores_of(
    models: Sequence[MSFlow],
    images: Images,
    batch_size: int = 16,
    workers: int = 0,
    progress: Progress = lambda done: None,
    stopwatch: Stopwatch | None = None,
) -> list[Scores]:
    """Of all images by each of ``models``, which differ in their flows only, on the CPU; the stages are load,
    extractor, flow and score."""
    first = models[0]
    device = next(first.parameters()).device
    stopwatch = stopwatch or Stopwatch(device)
    loader = iter(torch.utils.data.DataLoader(images, batch_size, num_workers=workers))
    batches: list[list[Scores]] = [[] for _ in models]
    done = 0
    while done < len(images):
        with stopwatch("load"):
            pixels = next(loader)["image"].to(device, memory_format=torch.channels_last)
        with stopwatch("extractor"):
            features = first.features(pixels)
        for model, of_model in zip(models, batches, strict=True):
            with stopwatch("flow"):
                maps, _ = model.flow.log_likelihood_maps(features)
            with stopwatch("score"):
                scores = score_log_likelihoods(maps, model.image_size, backend=model.flow.backend)
                of_model.append(Scores(*(part.float().cpu() for part in scores)))
        done += len(pixels)
        progress(done)
    return [joined(of_model) for of_model in batches]


def evaluate(
    model: MSFlow,
    images: ImageSet,
    batch_size: int = 16,
    workers: int = 0,
    progress: Progress = lambda done: None,
) -> tuple[Evaluation, Scores]:
    """Scores the test images of ``images`` with ``model`` (on its device) and judges them.

    ``workers``: processes that read images. ``progress`` is called with the number of images done so far.
    Errors: InputError where the set has only good or only defective test images, or a file cannot be read.
    """
    return evaluate_all([model], images, batch_size, workers, progress)[0]


def evaluate_all(
    models: Sequence[MSFlow],
    images: ImageSet,
    batch_size: int = 16,
    workers: int = 0,
    progress: Progress = lambda done: None,
    stopwatch: Stopwatch | None = None,
    stage: Callable[[str, int], None] = lambda what, total: None,
) -> list[tuple[Evaluation, Scores]]:
    """The same for models that differ in their flows only: the extractor runs once.

    ``stopwatch``: gets the wall time of load, extractor, flow, score and metrics. ``stage``: told what comes next, and
    up to which number ``progress`` then counts.
    """
    first = models[0]
    stopwatch = stopwatch or Stopwatch(next(first.parameters()).device)
    with stopwatch("load"):
        truth = Truth.of(images, first.image_size)
    for model in models:
        model.eval()
    # Without the masks, which are read already.
    files = LooseImages([sample.image for sample in images.test], first.image_size)
    scores = scores_of(models, files, batch_size, workers, progress, stopwatch)
    stage("computing metrics", len(models))
    evaluations = []
    for model, of_model in zip(models, scores, strict=True):
        with stopwatch("metrics"):
            evaluations.append(truth.judge(of_model, model.calibration))
        progress(len(evaluations))
    return list(zip(evaluations, scores, strict=True))
