"""Scores of a set's images, taken in batch by batch: into metrics, into a calibration. Maps are not kept for long."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..calibration import Calibration
from ..distributed.process_group import SINGLE_PROCESS, ProcessGroup
from ..errors import InputError, first_few
from ..metrics import auroc
from ..scoring import ImageScores, MapKind, Scores
from .ground_truth import GroundTruth
from .pixel_metrics import BinnedPixelMetrics, Curve, ExactPixelMetrics, Pixels
from .results import Evaluation
from .score_map_store import ScoreMapStore

# Of some millions of pixels a sample does.
MEDIAN_PIXELS = 1_000_000


@dataclass(frozen=True)
class TestResult:
    """What one model made of a test set."""

    evaluation: Evaluation
    scores: ImageScores
    """In the set's order."""
    maps: ScoreMapStore | None
    """The map to show of each image; None: not kept, or with another process."""
    pixels: Pixels | None

    def pro_curve(self) -> Curve | None:
        """See fastmsflow.metrics.pro_curve; None where there are no masks."""
        return None if self.pixels is None else self.pixels.pro_curve()


class Evaluator:
    """Judges one model on a test set.

    ``levels``: of its flow. ``maps``: where the maps to show go, of ``kind``. Of several processes each adds the images
    that it scored.
    """

    def __init__(
        self,
        truth: GroundTruth,
        levels: int,
        kind: MapKind = "additive",
        maps: ScoreMapStore | None = None,
        world: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self._truth = truth
        self._kind: MapKind = kind
        self._maps = maps
        self._images = ScoreCollector(world)
        self._pixels: Pixels | None = None
        if truth.has_masks:
            size = truth.image_size
            of_one = ExactPixelMetrics(len(truth.labels), size) if truth.exact else None
            self._pixels = of_one or BinnedPixelMetrics(levels, size, world)

    def add(self, numbers: Sequence[int], scores: Scores, masks: np.ndarray | None) -> None:
        """``scores``: of the images of ``numbers``, float32 on the CPU; ``masks``: theirs, where the set has masks.

        Errors: InputError where maps cannot be written.
        """
        self._images.add(numbers, scores)
        # Else ``judge`` names the images.
        if not scores.absolute_score.isfinite().all():
            return
        if self._pixels is not None and masks is not None:
            self._pixels.add(numbers, scores, masks)
        if self._maps is not None:
            self._maps.add(numbers, scores.score_map(self._kind).numpy())

    def complete(self) -> None:
        """When all images are in; for all processes to call, before anything else that they do together."""
        if self._pixels is not None:
            self._pixels.complete()

    def judge(self, calibration: Calibration | None) -> TestResult:
        """After ``complete``; for all processes to call. Errors: InputError naming the images whose score is not
        finite."""
        numbers, scores = self._images.joined()
        check_finite(scores, numbers, self._truth.names)
        figures = {} if self._pixels is None else self._pixels.figures()._asdict()
        labels = self._truth.labels
        evaluation = Evaluation(
            auroc(labels, scores.score),
            auroc(labels, scores.log_score),
            auroc(labels, scores.absolute_score),
            **figures,
            **_at_threshold(labels, scores.absolute_score.numpy(), calibration),
        )
        return TestResult(evaluation, scores, None if self._maps is None else self._maps.shared(), self._pixels)


class Calibrator:
    """Calibrates on held-out good images. Of several processes each adds the images that it scored.

    ``names``: by the images' numbers. ``images``: how many they are; None: as many as names.
    """

    def __init__(self, names: Sequence[str], world: ProcessGroup = SINGLE_PROCESS, images: int | None = None) -> None:
        self._count = len(names) if images is None else images
        self._names = names
        self._world = world
        self._images = ScoreCollector(world)
        self._peaks: list[tuple[int, float]] = []
        self._pixels: list[Tensor] = []

    def add(self, numbers: Sequence[int], scores: Scores) -> None:
        """``scores``: of the images of ``numbers``, float32 on the CPU."""
        self._images.add(numbers, scores)
        maps = scores.absolute_map
        self._peaks += zip(numbers, maps.amax(dim=(1, 2)).tolist(), strict=True)
        # Every so many pixels of all images' in a row, however they come.
        size = maps[0].numel()
        step = max(1, self._count * size // MEDIAN_PIXELS)
        for number, one in zip(numbers, maps, strict=True):
            self._pixels.append(one.flatten()[-number * size % step :: step].clone())

    def calibration(self, false_alarms: float) -> Calibration:
        """When all images are in; for all processes to call. Errors: InputError naming the images whose score is not
        finite."""
        numbers, scores = self._images.joined()
        check_finite(scores, numbers, self._names)
        peaks = sorted(peak for own in self._world.all_gather(self._peaks) for peak in own)
        pixels = torch.cat(list(self._world.all_gather(torch.cat(self._pixels or [torch.empty(0)]))))
        absolute = scores.absolute_score.tolist()
        return Calibration(tuple(absolute), tuple(peak for _, peak in peaks), pixels.median().item(), false_alarms)


class ScoreCollector:
    """Images' scores, put in the order of the images' numbers in the end."""

    def __init__(self, world: ProcessGroup) -> None:
        self._world = world
        self._numbers: list[int] = []
        self._scores: list[Tensor] = []

    def add(self, numbers: Sequence[int], scores: Scores) -> None:
        self._numbers += numbers
        self._scores.append(torch.stack([scores.score, scores.log_score, scores.absolute_score], dim=1))

    def joined(self) -> tuple[list[int], ImageScores]:
        """The numbers, ascending, and their scores: of all processes, on each of them."""
        own = torch.cat(self._scores or [torch.empty(0, 3)])
        everyone = self._world.all_gather((self._numbers, own))
        numbers, order = torch.tensor([number for numbers, _ in everyone for number in numbers]).sort()
        return numbers.tolist(), ImageScores(*torch.cat([of_one for _, of_one in everyone])[order].unbind(dim=1))


def check_finite(scores: ImageScores, numbers: Sequence[int], names: Sequence[str]) -> None:
    """``scores``: of the images of ``numbers``. Errors: InputError naming those whose score is not finite."""
    finite = scores.absolute_score.isfinite().tolist()
    faults = [names[number] for number, fine in zip(numbers, finite, strict=True) if not fine]
    if faults:
        raise InputError(
            f"the score is not finite of {first_few(faults)}; look at them, or for where the model overflows"
        )


def _at_threshold(labels: np.ndarray, scores: np.ndarray, calibration: Calibration | None) -> dict[str, float]:
    if calibration is None or not calibration.is_enough():
        return {}
    called = scores > calibration.threshold().value
    hits = int((called & (labels == 1)).sum())
    defective = int((labels == 1).sum())
    return {
        "false_alarm_rate": float(called[labels == 0].mean()),
        "recall": hits / defective,
        "f1": 2 * hits / (defective + int(called.sum())),
    }
