"""Counts the pixels above a threshold that is known beforehand: exactly, in constant memory, one comparison a map."""

import math
from collections.abc import Sequence

import numpy as np

from ..distributed.process_group import ProcessGroup
from ..metrics.auroc import f1_of_counts

COUNTS = ("hits", "false", "defective", "good")


class PixelDecisions:
    """Counts pixels of absolute maps above ``threshold``, in nats; each process adds the images that it scored.

    ``labels`` (N,): 1 for a defective image, 0 for a good one.
    """

    def __init__(self, threshold: float, labels: np.ndarray, world: ProcessGroup) -> None:
        self._threshold = threshold
        self._labels = labels
        self._world = world
        self._counts = dict.fromkeys(COUNTS, 0)
        self._shares: list[float] = []

    def add(self, numbers: Sequence[int], absolute: np.ndarray, masks: np.ndarray | None) -> None:
        """Adds the maps (B, H, W) float32 of the images of ``numbers``, and their masks (B, H, W) bool.

        Without masks, nothing but the share of each good image is counted.
        """
        for i, number in enumerate(numbers):
            above = absolute[i] > self._threshold
            called = np.count_nonzero(above)
            if not self._labels[number]:
                self._shares.append(called / above.size)
            if masks is not None:
                hits, defective = np.count_nonzero(above & masks[i]), np.count_nonzero(masks[i])
                counts = (hits, called - hits, defective, above.size - defective)
                for name, count in zip(COUNTS, counts, strict=True):
                    self._counts[name] += int(count)

    def compute(self) -> dict[str, float | None]:
        """Returns the metrics of the maps of all processes, which all call this, by their names in Evaluation."""
        gathered = self._world.all_gather((self._counts, self._shares))
        total = {name: sum(counts[name] for counts, _ in gathered) for name in COUNTS}
        # The same sum to the bit, however many processes there are.
        shares = [share for _, some in gathered for share in some]
        metrics: dict[str, float | None] = {"false_pixel_rate": math.fsum(shares) / len(shares)}
        if total["defective"] and total["good"]:
            called = total["hits"] + total["false"]
            metrics["seg_f1"] = f1_of_counts(total["hits"], called, total["defective"])
            metrics["pixel_fpr"] = total["false"] / total["good"]
        return metrics
