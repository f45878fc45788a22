"""A detector with scikit-learn's conventions; ``fit`` needs the ``train`` extra."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils.validation import check_is_fitted

from ..data import ImageFileDataset, list_images
from ..data.reader_pool import BATCH_SIZE, batched, read_images
from ..errors import InputError, UnavailableError
from ..models.msflow import MSFlow
from ..nn.feature_pooling import Pool
from ..number_range import COUNT, SEED, above
from ..recipe import WARM_UP_SHARE, Recipe
from ..scoring import Scores

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Images", "MSFlowDetector"]

Images = str | Path | np.ndarray | Sequence[str | Path | np.ndarray]
"""Images as MSFlowDetector accepts them."""


class MSFlowDetector(OutlierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no annotations
    """Learns from images without defects, and then scores others: the larger a score, the more normal the image.

    Images are given as a folder; as a sequence of files, or of arrays (H, W) or (H, W, 3) of uint8; or as one array of
    all images, (N, H, W) or (N, H, W, 3).

    ``extractor``, ``extractor_weights``, ``pool``, ``standardise``: see fastmsflow.MSFlow. ``image_size``: images are
    resized to this square. ``epochs``, ``lr``, ``batch_size``, ``random_state``: see fastmsflow.training.Recipe, whose
    published values are the defaults; the warm-up takes 12% of ``epochs``, however few they are. ``contamination``:
    share of the training images that ``predict`` calls abnormal, and so about the share of false alarms. ``verbose``
    shows progress.

    After ``fit``: ``model_``, the fastmsflow.MSFlow; ``offset_``, the score that divides normal from abnormal;
    ``losses_``, the mean nll of each epoch in nats per image.
    """

    model_: MSFlow
    offset_: float
    losses_: list[float]

    def __init__(
        self,
        extractor: str = "wide_resnet50_2.tv_in1k",
        extractor_weights: str | Path | None = None,
        image_size: int = 512,
        pool: Pool = "avg",
        standardise: bool = False,
        epochs: int = 100,
        lr: float = 1e-4,
        batch_size: int = 8,
        contamination: float = 0.05,
        random_state: int = 9826,
        verbose: bool = False,
    ) -> None:
        self.extractor = extractor
        self.extractor_weights = extractor_weights
        self.image_size = image_size
        self.pool: Pool = pool
        self.standardise = standardise
        self.epochs = epochs
        self.lr = lr
        self.batch_size = batch_size
        self.contamination = contamination
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Images, y: object = None) -> "Self":
        """Trains on ``X``, images without defects; ``y`` is not used.

        Raises: InputError if an image cannot be read, a parameter is out of its range or the loss is not finite;
        UnavailableError if the extra is not installed.
        """
        try:
            from rich.console import Console

            from ..training.datamodule import TRAIN, FeatureTrainingData
            from ..training.lightning_module import MSFlowLightningModule
            from ..training.trainer import prepare, run_trainer
        except ImportError as error:
            package = (error.name or "").partition(".")[0]
            raise UnavailableError(f"fit needs {package}: pip install 'fastmsflow[train]'") from error
        above(0, 0.5).check("contamination", self.contamination)
        COUNT.check("epochs", self.epochs)
        SEED.check("random_state", self.random_state)
        recipe = Recipe(
            self.lr, self.batch_size, self.epochs, sub_epochs=1, seed=self.random_state, warm_up_share=WARM_UP_SHARE
        )
        torch.manual_seed(self.random_state)
        model = MSFlow(
            self.extractor,
            image_size=(self.image_size, self.image_size),
            pool=self.pool,
            extractor_weights=self.extractor_weights,
            standardise=self.standardise,
        )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model.to(device).to(memory_format=torch.channels_last)
        console = Console(quiet=not self.verbose)
        images = ImageFileDataset(_listed(X), model.image_size)
        source = FeatureTrainingData(model, {TRAIN: images}, recipe)
        module = MSFlowLightningModule(model, recipe, {TRAIN: [images.name(i) for i in range(len(images))]})
        prepare(source, console)
        run_trainer(module, source, recipe, console)
        self.model_ = model.to(device)
        self.losses_ = module.epoch_losses
        with torch.no_grad():
            batches = (
                model.scores_of_features([level.to(device) for level in batch.inputs])
                for batch in source.sequential_loader(TRAIN, BATCH_SIZE)
            )
            self.offset_ = float(np.quantile(_normality(batches), self.contamination))
        return self

    def score_samples(self, X: Images) -> np.ndarray:
        """Returns (N,) float32, minus the log score of fastmsflow.scoring, in nats: at most 0, larger is more normal.

        Raises: InputError if an image cannot be read; scikit-learn's NotFittedError before ``fit``.
        """
        return _normality(self._scores(X))

    def decision_function(self, X: Images) -> np.ndarray:
        """Returns (N,) ``score_samples`` - ``offset_``, in nats: negative for an abnormal image.

        Raises: the errors of ``score_samples``.
        """
        return self.score_samples(X) - self.offset_

    def predict(self, X: Images) -> np.ndarray:
        """Returns (N,) int: -1 for an abnormal image, 1 for a normal one. Raises: the errors of ``score_samples``."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def score_maps(self, X: Images) -> np.ndarray:
        """Returns the published additive maps (N, image_size, image_size) float32.

        Values range from 0, the most normal pixel of an image, to the number of levels. Pixels of
        ``model_.scores(images).absolute_map`` are comparable between images.
        Raises: the errors of ``score_samples``.
        """
        return torch.cat([scores.score_map_add for scores in self._scores(X)]).cpu().numpy()

    def _scores(self, X: Images) -> Iterator[Scores]:
        check_is_fitted(self)
        device = next(self.model_.parameters()).device
        images = ImageFileDataset(_listed(X), self.model_.image_size)
        with torch.no_grad():
            for pixels in read_images(images, batched(range(len(images))), device=device):
                yield self.model_.scores(pixels)


def _normality(batches: Iterable[Scores]) -> np.ndarray:
    return -np.concatenate([scores.log_score.cpu().numpy() for scores in batches])


def _listed(images: Images) -> Sequence[str | Path | np.ndarray]:
    """Returns the images as a sequence. Raises: InputError if there are none."""
    if isinstance(images, (str, Path)):
        return list_images(images)
    if not len(images):
        raise InputError("no images were given; give a folder, files or arrays of uint8")
    return list(images)
