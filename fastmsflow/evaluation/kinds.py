"""Metrics of each kind of defect: its images against all good ones, and the mean of all kinds."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ..calibration import Calibration
from ..scoring import MapKind, Scores
from .evaluator import Evaluator, TestResult
from .ground_truth import GroundTruth
from .results import mean_evaluation
from .score_map_store import ScoreMapStore

MEAN_OF_KINDS = "mean of kinds"


class _Part(NamedTuple):
    """The images of one kind of defect and all good ones."""

    place: Mapping[int, int]
    """Number of an image in the set -> its number among these."""
    evaluator: Evaluator


class EvaluatorByKind(Evaluator):
    """Computes the metrics of a test set as Evaluator does, and those of each kind of defect besides, in one process.

    A kind is the name of a test folder. Each is judged against the same good images, as papers on MVTec LOCO AD do.
    The arguments are those of Evaluator; the maps to show are those of the whole set.
    """

    def __init__(
        self,
        ground_truth: GroundTruth,
        levels: int,
        *,
        calibration: Calibration | None = None,
        map_kind: MapKind = "additive",
        maps: ScoreMapStore | None = None,
    ) -> None:
        super().__init__(ground_truth, levels, calibration=calibration, map_kind=map_kind, maps=maps)
        labels = ground_truth.labels
        kinds = np.array([sample.kind for sample in ground_truth.samples])
        self._parts: dict[str, _Part] = {}
        for kind in dict.fromkeys(kinds[labels == 1].tolist()):
            numbers = np.flatnonzero((labels == 0) | (kinds == kind)).tolist()
            place = {number: i for i, number in enumerate(numbers)}
            self._parts[kind] = _Part(place, Evaluator(ground_truth.part(numbers), levels, calibration=calibration))

    def add(self, numbers: Sequence[int], scores: Scores, masks: np.ndarray | None) -> None:
        """Adds scores and masks as Evaluator does."""
        super().add(numbers, scores, masks)
        for place, evaluator in self._parts.values():
            rows = [row for row, number in enumerate(numbers) if number in place]
            if rows:
                own = Scores(*(value[rows] for value in scores))
                evaluator.add([place[numbers[row]] for row in rows], own, None if masks is None else masks[rows])

    def complete(self) -> None:
        """Ends the adding."""
        super().complete()
        for part in self._parts.values():
            part.evaluator.complete()

    def result(self) -> TestResult:
        """Computes the metrics of the whole set, of each kind and their mean; the errors are those of Evaluator."""
        whole = super().result()
        kinds = {kind: part.evaluator.result().evaluation for kind, part in self._parts.items()}
        return replace(whole, kinds={**kinds, MEAN_OF_KINDS: mean_evaluation(list(kinds.values()))})
