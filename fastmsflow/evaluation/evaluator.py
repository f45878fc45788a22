"""Collects scores batch by batch, and computes metrics or a calibration from them."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..calibration import Calibration, pixel_threshold
from ..distributed.process_group import SINGLE_PROCESS, ProcessGroup
from ..errors import InputError, first_few
from ..metrics import auroc, f1_at
from ..pixel_calibration import FALSE_PIXELS, PixelThresholds, as_profiles, tail_profile
from ..scoring import ImageScores, MapKind, Scores
from .ground_truth import GroundTruth
from .pixel_decisions import PixelDecisions
from .pixel_metrics import BinnedPixelMetrics, Curve, ExactPixelMetrics, PixelMetricsAccumulator
from .results import Evaluation
from .score_map_store import ScoreMapStore

# The median of a set's pixels is taken over about so many of them.
MEDIAN_PIXELS = 1_000_000


@dataclass(frozen=True)
class TestResult:
    """Metrics, scores and maps of one model on a test set."""

    evaluation: Evaluation
    scores: ImageScores
    """Scores of the images, in the set's order."""
    maps: ScoreMapStore | None
    """The map to show of each image; None if they are not stored, or another process has them."""
    pixel_metrics: PixelMetricsAccumulator | None
    kinds: Mapping[str, Evaluation] = field(default_factory=dict)
    """The metrics of each kind of defect and their mean, see fastmsflow.evaluation.kinds; empty if they are not asked
    for."""

    def pro_curve(self) -> Curve | None:
        """Returns the curve of fastmsflow.metrics.pro_curve; None if there are no masks or they mark nothing."""
        return None if self.pixel_metrics is None else self.pixel_metrics.pro_curve()


class Evaluator:
    """Computes the metrics of one model on a test set from scores that are added batch by batch.

    ``levels``: number of levels of the model's flow. ``calibration``: has the thresholds at which decisions are judged.
    ``maps``: stores the maps to show, of ``map_kind``. Each of several processes adds the images that it scored.
    """

    def __init__(
        self,
        ground_truth: GroundTruth,
        levels: int,
        *,
        calibration: Calibration | None = None,
        map_kind: MapKind = "additive",
        maps: ScoreMapStore | None = None,
        world: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self._ground_truth = ground_truth
        self._calibration = calibration
        self._map_kind: MapKind = map_kind
        self._maps = maps
        self._world = world
        self._scores = ScoreCollector(ground_truth.names, world)
        self._pixel_metrics: PixelMetricsAccumulator | None = None
        if ground_truth.has_masks and ground_truth.exact and ground_truth.image_size is not None:
            self._pixel_metrics = ExactPixelMetrics(len(ground_truth.labels), ground_truth.image_size)
        elif ground_truth.has_masks:
            self._pixel_metrics = BinnedPixelMetrics(levels, world)
        self._pixel_decisions: PixelDecisions | None = None
        threshold = pixel_threshold(calibration)
        if threshold is not None:
            self._pixel_decisions = PixelDecisions(threshold.value, ground_truth.labels, world)

    def add(self, numbers: Sequence[int], scores: Scores, masks: np.ndarray | None) -> None:
        """Adds the scores of the images of ``numbers``, float32 on the CPU, and their masks if the set has masks.

        The images of a call are of one size. Raises: InputError if maps cannot be written.
        """
        self._scores.add(numbers, scores)
        # ``result`` names images whose score is not finite.
        if not scores.absolute_score.isfinite().all():
            return
        if self._pixel_metrics is not None and masks is not None:
            self._pixel_metrics.add(numbers, scores, masks)
        if self._pixel_decisions is not None:
            self._pixel_decisions.add(numbers, scores.absolute_map.numpy(), masks)
        if self._maps is not None:
            self._maps.add(numbers, scores.score_map(self._map_kind).numpy())

    def complete(self) -> None:
        """Ends the adding; all processes call this before they exchange anything else."""
        if self._pixel_metrics is not None:
            self._pixel_metrics.complete()

    def result(self) -> TestResult:
        """Computes the metrics of the images of all processes, which all call this after ``complete``.

        Raises: InputError with the names of images whose score is not finite.
        """
        scores = self._scores.gather()
        if self._ground_truth.has_masks:
            self._ground_truth.mask_notes.warn(self._ground_truth.image_size, self._world)
        pixel_metrics = {} if self._pixel_metrics is None else self._pixel_metrics.compute()
        pixel_decisions = {} if self._pixel_decisions is None else self._pixel_decisions.compute()
        labels = self._ground_truth.labels
        evaluation = Evaluation(
            auroc(labels, scores.score),
            auroc(labels, scores.log_score),
            auroc(labels, scores.absolute_score),
            **pixel_metrics,
            **pixel_decisions,
            **_at_threshold(labels, scores.absolute_score.numpy(), self._calibration),
        )
        maps = None if self._maps is None else self._maps.gather()
        return TestResult(evaluation, scores, maps, self._pixel_metrics)


class Calibrator:
    """Computes a calibration from the scores of held-out good images; each process adds the images that it scored.

    ``names``: names of the images, by number. ``images``: number of images of all processes; None: as many as names.
    """

    def __init__(self, names: Sequence[str], world: ProcessGroup = SINGLE_PROCESS, images: int | None = None) -> None:
        self._count = len(names) if images is None else images
        self._world = world
        self._scores = ScoreCollector(names, world)
        self._numbers: list[int] = []
        # Small arrays that stay among maps that go would break up the heap, whose holes are then too small for maps.
        self._profiles, self._pixels = array("f"), array("f")

    def add(self, numbers: Sequence[int], scores: Scores) -> None:
        """Adds the scores of the images of ``numbers``, float32 on the CPU."""
        self._scores.add(numbers, scores)
        maps = scores.absolute_map
        # Samples every ``step``-th pixel of all images in a row, whatever the order in which they are added; of images
        # of several sizes about as many of each.
        size = maps[0].numel()
        step = max(1, self._count * size // MEDIAN_PIXELS)
        for number, score_map in zip(numbers, maps.numpy(), strict=True):
            self._pixels.frombytes(score_map.ravel()[-number * size % step :: step].tobytes())
            self._profiles.frombytes(tail_profile(score_map).tobytes())
        self._numbers += numbers

    def calibration(self, false_alarms: float, false_pixels: float = FALSE_PIXELS) -> Calibration:
        """Returns the calibration on the images of all processes, which all call this.

        Raises: InputError with the names of images whose score is not finite.
        """
        scores = self._scores.gather()
        gathered = self._world.all_gather((self._numbers, self._profiles, self._pixels))
        order = np.argsort([number for numbers, _, _ in gathered for number in numbers])
        profiles = np.concatenate([as_profiles(profiles) for _, profiles, _ in gathered])[order]
        pixels = torch.from_numpy(np.concatenate([np.frombuffer(pixels, np.float32) for *_, pixels in gathered]))
        return Calibration(
            tuple(scores.absolute_score.tolist()),
            # The first value of a profile is the map's largest.
            tuple(profiles[:, 0, 0].tolist()),
            pixels.median().item(),
            false_alarms,
            pixels=PixelThresholds.from_profiles(profiles),
            false_pixels=false_pixels,
        )


class ScoreCollector:
    """Collects image scores, and sorts them by the images' numbers. ``names``: names of the images, by number."""

    def __init__(self, names: Sequence[str], world: ProcessGroup) -> None:
        self._names = names
        self._world = world
        self._numbers: list[int] = []
        self._scores: list[tuple[float, float, float]] = []

    def add(self, numbers: Sequence[int], scores: Scores) -> None:
        self._numbers += numbers
        # Numbers of Python, not tensors, for the reason that Calibrator gives.
        self._scores += zip(
            scores.score.tolist(), scores.log_score.tolist(), scores.absolute_score.tolist(), strict=True
        )

    def gather(self) -> ImageScores:
        """Returns the scores of the images of all processes, on each of them.

        Raises: InputError with the names of images whose score is not finite.
        """
        gathered = self._world.all_gather((self._numbers, self._scores))
        numbers, order = torch.tensor([number for numbers, _ in gathered for number in numbers]).sort()
        rows = [row for _, rows in gathered for row in rows]
        scores = ImageScores(*torch.tensor(rows).reshape(-1, 3)[order].unbind(dim=1))
        faults = [self._names[int(number)] for number in numbers[~scores.absolute_score.isfinite()]]
        if faults:
            raise InputError(
                f"the score is not finite of {first_few(faults)}; look at them, or for where the model overflows"
            )
        return scores


def _at_threshold(labels: np.ndarray, scores: np.ndarray, calibration: Calibration | None) -> dict[str, float]:
    if calibration is None or not calibration.is_enough():
        return {}
    threshold = calibration.threshold().value
    predicted = scores > threshold
    return {
        "false_alarm_rate": float(predicted[labels == 0].mean()),
        "recall": float(predicted[labels == 1].mean()),
        "f1": f1_at(labels, scores, threshold),
    }
