"""Scores of a test set -> metrics."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from ..data import ImageDataset, ImageSet, load_mask
from ..errors import InputError
from ..files import written_aside
from ..metrics import aupro, auroc
from ..model import MSFlow
from ..scoring import Scores, additive_score_map
from .features import Progress


@dataclass(frozen=True)
class Results:
    """Scores of a whole test set, float32, on the CPU, in its order."""

    score: np.ndarray
    """(N,) the published image score."""
    log_score: np.ndarray
    """(N,) the image score in log space, nats."""
    score_map_add: np.ndarray
    """(N, H, W), its maximum taken over the whole set."""
    log_likelihood: np.ndarray
    """(N, H, W) L of fastmsflow.scoring, at most 0."""

    @classmethod
    def collect(cls, batches: Iterable[Scores]) -> "Results":
        """Joins the scores of batches."""
        joined = Scores(*(torch.cat([t.float().cpu() for t in parts]) for parts in zip(*batches, strict=True)))
        return cls(
            joined.score.numpy(),
            joined.log_score.numpy(),
            additive_score_map(joined.likelihood_add).numpy(),
            joined.log_likelihood.numpy(),
        )


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one moment of training; all in [0, 1]. None where the set has no masks."""

    image_auroc: float
    """Of the published image score."""
    image_auroc_log: float
    """Of the image score in log space."""
    pixel_auroc: float | None = None
    """Of the additive maps."""
    aupro: float | None = None
    """Of the multiplicative maps 1 - exp(L), up to a false-positive rate of 0.3."""
    aupro_log: float | None = None
    """Of -L: the same order of pixels, without the ties where exp(L) underflows."""

    def as_dict(self) -> dict[str, float | None]:
        """Metric -> value."""
        return asdict(self)


@dataclass(frozen=True)
class Truth:
    """Labels (N,) of a test set, and its masks (N, H, W) where it has them."""

    labels: np.ndarray
    masks: np.ndarray | None

    @classmethod
    def of(cls, images: ImageSet, image_size: tuple[int, int]) -> "Truth":
        labels = np.array([sample.label for sample in images.test])
        defective = int(labels.sum())
        if defective in (0, len(labels)):
            raise InputError(
                f"{images.name}: evaluating needs good and defective test images;"
                f" it has {len(labels) - defective} good and {defective} defective"
            )
        masks = None
        if images.has_masks:
            masks = np.stack([load_mask(sample, image_size).numpy() for sample in images.test])
        return cls(labels, masks)

    def judge(self, results: Results) -> Evaluation:
        pixel = {}
        if self.masks is not None:
            pixel = {
                "pixel_auroc": auroc(self.masks, results.score_map_add),
                "aupro": aupro(self.masks, 1 - np.exp(results.log_likelihood)),
                "aupro_log": aupro(self.masks, -results.log_likelihood),
            }
        return Evaluation(auroc(self.labels, results.score), auroc(self.labels, results.log_score), **pixel)


def evaluate(
    model: MSFlow,
    images: ImageSet,
    batch_size: int = 16,
    workers: int = 0,
    progress: Progress = lambda done: None,
) -> tuple[Evaluation, Results]:
    """Scores the test images of ``images`` with ``model`` (on its device) and judges them.

    ``workers``: processes that read images. ``progress`` is called with the number of images done so far.
    Errors: InputError where the set has only good or only defective test images, or a file cannot be read.
    """
    truth = Truth.of(images, model.image_size)
    dataset = ImageDataset(images.test, model.image_size)
    device = next(model.parameters()).device

    def batches() -> Iterator[Scores]:
        done = 0
        for batch in torch.utils.data.DataLoader(dataset, batch_size, num_workers=workers):
            yield model.scores(batch["image"].to(device, memory_format=torch.channels_last))
            done += len(batch["image"])
            progress(done)

    model.eval()
    with torch.no_grad():
        results = Results.collect(batches())
    return truth.judge(results), results


def write_json(path: Path, content: object) -> None:
    """JSON, indented, written aside and renamed."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(content, indent=2, default=str) + "\n")
