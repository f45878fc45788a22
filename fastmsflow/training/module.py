"""The Lightning side: what a step, an evaluation and the schedule are."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from ..errors import InputError
from ..model import MSFlow
from ..scoring import Scores
from .evaluation import Evaluation, Results, Truth
from .features import Images, Progress, feature_loader, pooled_features
from .recipe import Recipe


@dataclass(frozen=True)
class Moment:
    """An evaluation and the number of passes over the training images before it."""

    epoch: int
    evaluation: Evaluation


class MSFlowModule(L.LightningModule):
    """Trains ``model.flow`` on batches of features; evaluates on a test set's features where ``truth`` is given.

    ``end_round`` is called after each meta epoch.
    """

    def __init__(self, model: MSFlow, recipe: Recipe, truth: Truth | None, end_round: Callable[[], None]) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.truth = truth
        self.end_round = end_round
        self.moments: list[Moment] = []
        self.epoch_losses: list[float] = []
        self.results: Results | None = None
        self._batches: list[Scores] = []
        self._losses: list[Tensor] = []

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        # One pass over the weights. float16's scaler unscales too late for clipping where the optimizer is fused.
        fused = self.recipe.precision != "16-mixed"
        optimizer = torch.optim.Adam(self.model.flow.parameters(), lr=self.recipe.lr, fused=fused)
        schedule = LambdaLR(optimizer, self.recipe.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}

    def training_step(self, features: list[Tensor], batch_index: int) -> Tensor:
        loss = self.model.flow.nll(features).mean()
        self.log("nll", loss, prog_bar=True, on_step=True, batch_size=len(features[0]))
        self._losses.append(loss.detach())
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Lightning's own refuses fused optimizers in mixed precision, though bfloat16 has no scaler to wait for."""
        torch.nn.utils.clip_grad_norm_(self.model.flow.parameters(), self.recipe.clip_norm)

    def on_train_epoch_end(self) -> None:
        self.epoch_losses.append(self._mean_loss())
        self._losses.clear()
        # Lightning evaluates before it calls this hook.
        if len(self.epoch_losses) % self.recipe.sub_epochs == 0:
            self.end_round()

    def on_validation_epoch_start(self) -> None:
        self._mean_loss()

    def _mean_loss(self) -> float:
        loss = torch.stack(self._losses).mean().item()
        if not math.isfinite(loss):
            raise InputError(
                f"the loss is {loss} in epoch {self.current_epoch + 1}; try a lower learning rate or 32-true"
            )
        return loss

    def validation_step(self, features: list[Tensor], batch_index: int) -> None:
        self._batches.append(Scores(*(part.cpu() for part in self.model.scores_of_features(features))))

    def on_validation_epoch_end(self) -> None:
        if self.truth is None:
            return
        self.results = Results.collect(self._batches)
        self._batches.clear()
        evaluation = self.truth.judge(self.results)
        self.moments.append(Moment(self.current_epoch + 1, evaluation))
        self.log_dict({key: value for key, value in evaluation.as_dict().items() if value is not None})


class FeatureDataModule(L.LightningDataModule):
    """Features of images, computed once by ``model`` (and standardised by it, where it does that)."""

    def __init__(self, model: MSFlow, train: Images, test: Images | None, recipe: Recipe, workers: int = 0) -> None:
        super().__init__()
        self.model = model
        self.train_images = train
        self.test_images = test
        self.recipe = recipe
        self.workers = workers
        self.train_features: list[Tensor] = []
        self.test_features: list[Tensor] = []

    @property
    def total(self) -> int:
        """How many images have their features computed."""
        return len(self.train_images) + (len(self.test_images) if self.test_images is not None else 0)

    def compute(self, progress: Progress = lambda done: None) -> None:
        """Runs the extractor over all images, once."""
        trained = len(self.train_images)
        self.train_features = pooled_features(self.model, self.train_images, 16, self.workers, progress)
        if self.test_images is not None:
            self.test_features = pooled_features(
                self.model, self.test_images, 16, self.workers, lambda done: progress(trained + done)
            )
        if self.model.standardiser is not None:
            self.model.standardiser.fit(self.train_features)
            self.train_features = self.model.standardiser(self.train_features)
            self.test_features = self.model.standardiser(self.test_features)

    def train_dataloader(self) -> DataLoader[list[Tensor]]:
        return feature_loader(self.train_features, self.recipe.batch_size, shuffle_seed=self.recipe.seed)

    def val_dataloader(self) -> DataLoader[list[Tensor]] | list[object]:
        return feature_loader(self.test_features, self.recipe.batch_size) if self.test_features else []
