"""A detector with scikit-learn's conventions; ``fit`` needs the ``train`` extra."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from ..data import ImageFileDataset, list_images
from ..data.folder_names import refuse_mixed
from ..data.image_formats import SUFFIXES, suffix_of
from ..data.image_io import image_from_pil
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

OneImage: TypeAlias = str | Path | np.ndarray | Image.Image
Images: TypeAlias = OneImage | Sequence[OneImage]
"""Images as MSFlowDetector accepts them."""
TAKEN = "a folder, a file, an image of PIL's, an array (H, W) or (H, W, 3) of uint8, or a list of these"


class MSFlowDetector(OutlierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no annotations
    """Learns from images without defects, and then scores others: the larger a score, the more normal the image.

    Images are given as a folder; as a file, an image of PIL's or an array (H, W) or (H, W, 3) of uint8; as a list of
    these; or as one array of all images, (N, H, W) or (N, H, W, 3). One image yields results of N = 1.

    ``extractor``, ``extractor_weights``, ``pool``, ``standardise``, ``layers``, ``level_strides``: see
    fastmsflow.MSFlow. ``image_size``: images are
    resized to this side, or (height, width). ``epochs``, ``lr``, ``batch_size``, ``random_state``: see
    fastmsflow.training.Recipe, whose published values are the defaults; the warm-up takes 12% of ``epochs``, however
    few they are. ``contamination``: share of the training images that ``predict`` calls abnormal, and so about the
    share of false alarms. ``verbose`` shows progress.

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
        image_size: int | tuple[int, int] = 512,
        pool: Pool = "avg",
        standardise: bool = False,
        epochs: int = 100,
        lr: float = 1e-4,
        batch_size: int = 8,
        contamination: float = 0.05,
        random_state: int | np.random.RandomState | None = 9826,
        verbose: bool = False,
        layers: Sequence[int] | None = None,
        level_strides: Sequence[int] | None = None,
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
        self.layers = layers
        self.level_strides = level_strides

    def fit(self, X: Images, y: object = None) -> "Self":
        """Trains on ``X``, images without defects; ``y`` is not used.

        Raises: InputError if an image cannot be read, names of folders below ``X`` say that some are not good, a
        parameter is out of its range or the loss is not finite; UnavailableError if the extra is not installed.
        """
        try:
            from ..terminal import Console
            from ..training.datamodule import TRAIN, FeatureTrainingData
            from ..training.lightning_module import MSFlowLightningModule
            from ..training.trainer import prepare, run_trainer
        except ImportError as error:
            package = (error.name or "").partition(".")[0]
            raise UnavailableError(f"fit needs {package}: pip install 'fastmsflow[train]'") from error
        above(0, 0.5).check("contamination", self.contamination)
        COUNT.check("epochs", self.epochs)
        image_size, files = _height_and_width(self.image_size), _listed(X)
        if isinstance(X, (str, Path)) and Path(X).is_dir():
            refuse_mixed(Path(X), [image for image in files if isinstance(image, Path)])
        seed = self.random_state
        if seed is None or isinstance(seed, np.random.RandomState):
            seed = check_random_state(seed).randint(2**31)
        SEED.check("random_state", seed)
        recipe = Recipe(
            self.lr, self.batch_size, self.epochs, sub_epochs=1, seed=int(seed), warm_up_share=WARM_UP_SHARE
        )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        # The caller's random numbers stay as they are.
        with torch.random.fork_rng([torch.cuda.current_device()] if device == "cuda" else []):
            torch.manual_seed(seed)
            model = MSFlow(
                self.extractor,
                image_size=image_size,
                pool=self.pool,
                extractor_weights=self.extractor_weights,
                standardise=self.standardise,
                layers=self.layers,
                level_strides=self.level_strides,
            )
            model.to(device).to(memory_format=torch.channels_last)
            console = Console(quiet=not self.verbose)
            images = ImageFileDataset(files, image_size)
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
        """Returns the published additive maps (N, height, width) float32, of ``image_size``.

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


def _height_and_width(image_size: Any) -> tuple[int, int]:
    sides = list(image_size) if isinstance(image_size, (tuple, list)) else [image_size] * 2
    if len(sides) != 2 or not all(isinstance(side, (int, np.integer)) for side in sides):
        raise InputError(f"image_size is {image_size!r}; give a side in pixels, or (height, width)")
    return int(sides[0]), int(sides[1])


def _listed(images: Images) -> list[str | Path | np.ndarray]:
    """Returns the images one by one, files or arrays. Raises: InputError if there are none or it is something else."""
    if isinstance(images, (str, Path)):
        path = Path(images)
        is_file = path.is_file() or (suffix_of(path.name) in SUFFIXES and not path.is_dir())
        return [path] if is_file else list(list_images(path))
    is_one = isinstance(images, Image.Image)
    if isinstance(images, np.ndarray):
        # A gray image of 3 or 4 columns would be too small to be one.
        is_one = images.ndim == 2 or (images.ndim == 3 and images.shape[-1] in (3, 4))
    if is_one:
        given: list[object] = [images]
    elif (
        isinstance(images, (torch.Tensor, Mapping, bytes))
        or not isinstance(images, Iterable)
        or (isinstance(images, np.ndarray) and not images.ndim)
        or hasattr(images, "columns")  # a table of pandas, which iterates over their names
    ):
        raise InputError(f"the images are of type {type(images).__name__}; give {TAKEN}")
    else:
        given = list(images)
    if not given:
        raise InputError(f"no images were given; give {TAKEN}")
    return [_file_or_array(image, f"image {number}") for number, image in enumerate(given)]


def _file_or_array(image: object, name: str) -> str | Path | np.ndarray:
    if isinstance(image, Image.Image):
        return np.asarray(image_from_pil(image, name))
    if isinstance(image, (str, Path, np.ndarray)):
        return image
    raise InputError(f"{name} is of type {type(image).__name__}; give {TAKEN}")
