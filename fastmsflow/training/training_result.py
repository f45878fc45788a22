"""Results of a training run: of each evaluation in it, and of the whole run."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from ..data.error_log import SkippedImages
from ..evaluation.checkpoint_files import LAST_EPOCH, ON_HELD_OUT, ON_TEST
from ..evaluation.evaluator import TestResult
from ..evaluation.results import RANKING_METRICS, Evaluation


@dataclass(frozen=True)
class EpochResult:
    """Measurements after ``epoch`` passes over the training images."""

    epoch: int
    evaluation: Evaluation | None
    """Metrics on the test set; None without test images."""
    held_out_nll: float | None
    """Mean over the held-out images, in nats; None without such images."""

    def as_row(self) -> dict[str, Any]:
        """Returns the row of ``rounds`` in ``results.json``."""
        metrics = asdict(self.evaluation) if self.evaluation else {}
        return {"epoch": self.epoch, "held_out_nll": self.held_out_nll, **metrics}


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """Losses, metrics and speed of a training run."""

    losses: list[float]
    """The mean nll of each sub-epoch, averaged over its batches, in nats per image."""
    epoch_results: list[EpochResult]
    """Measurements after each meta epoch."""
    test_result: TestResult | None
    """The test set after the last epoch; None without test images. Its maps lie in a temporary file in the run's
    folder."""
    seconds: dict[str, float]
    """Wall time of ``features`` and ``training`` (evaluations included) in this process, in seconds."""
    speed: dict[str, float]
    """Images per second and other averages, see ThroughputCallback.speed."""
    left_out: SkippedImages | None = None
    """Images of shards that were skipped because of faults; None where faults are errors."""

    @property
    def last(self) -> Evaluation | None:
        """Metrics after the last epoch."""
        return self.epoch_results[-1].evaluation

    @property
    def held_out(self) -> EpochResult | None:
        """The epoch of the lowest nll on held-out good images: chosen without a test image."""
        return best_on_held_out(self.epoch_results)

    def best(self, metric: str) -> EpochResult | None:
        """Returns the epoch of the highest ``metric``: chosen on the test set, so an optimistic figure."""
        return best_on_test(self.epoch_results, metric)

    def summary(self) -> dict[str, dict[str, dict[str, float | int | None]]]:
        """Returns metric -> how the epoch was chosen -> ``value`` and ``epoch``.

        The epoch is the last one, the best on the test set (each metric its own epoch, as the literature reports them),
        or the one chosen on held-out good images.
        """
        table: dict[str, dict[str, dict[str, float | int | None]]] = {}
        for metric in self.last.as_shown() if self.last else {}:
            chosen = {LAST_EPOCH: self.epoch_results[-1]}
            best = self.best(metric)
            if best is not None and metric in RANKING_METRICS:
                chosen[ON_TEST] = best
            if self.held_out is not None:
                chosen[ON_HELD_OUT] = self.held_out
            table[metric] = {
                how: {"value": getattr(result.evaluation, metric), "epoch": result.epoch}
                for how, result in chosen.items()
            }
        return table

    def by_choice(self) -> dict[str, dict[str, float | None]]:
        """Returns how the epoch was chosen -> metric -> value."""
        summary = self.summary()
        return {
            how: {metric: row[how]["value"] for metric, row in summary.items() if how in row}
            for how in (LAST_EPOCH, ON_HELD_OUT, ON_TEST)
            if any(how in row for row in summary.values())
        }


def best_on_held_out(results: Sequence[EpochResult]) -> EpochResult | None:
    """Returns the first result with the lowest nll of the held-out images."""
    candidates = [result for result in results if result.held_out_nll is not None]
    return min(candidates, key=lambda result: cast(float, result.held_out_nll), default=None)


def best_on_test(results: Sequence[EpochResult], metric: str) -> EpochResult | None:
    """Returns the first result with the highest ``metric``."""
    candidates = [result for result in results if getattr(result.evaluation, metric, None) is not None]
    return max(candidates, key=lambda result: getattr(result.evaluation, metric), default=None)
