"""The Lightning side: what a step, an evaluation and the schedule are."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from ..errors import InputError
from ..model import MSFlow
from ..reference.likelihood import negative_log_likelihood
from ..scoring import Scores, score_log_likelihoods
from .break_even import measured
from .cached_features import AheadLoader, CachedFeatures, placement
from .evaluation import Evaluation, Truth, calibrated, joined
from .feature_cache import FeatureCache, binary
from .features import Batch, Features, Images, Progress, feature_loader, pooled_features
from .parts import parameter_groups, trained_parameters
from .recipe import Recipe

# Of an image set: training images, training images that are kept out of training, test images.
TRAIN, HELD_OUT, TEST = "train", "held out", "test"
STATE = "fastmsflow"


@dataclass(frozen=True)
class Moment:
    """What was measured after ``epoch`` passes over the training images."""

    epoch: int
    evaluation: Evaluation | None
    """On the test set, where there is one."""
    held_out_nll: float | None
    """Mean over the held-out images, nats, where there are any."""


class MSFlowModule(L.LightningModule):
    """Trains ``model.flow`` on batches of features; after each meta epoch scores the held-out images and the test set,
    where they are, and then calls ``end_round``.

    ``names``: of the images of TRAIN and HELD_OUT, for errors.
    """

    def __init__(
        self,
        model: MSFlow,
        recipe: Recipe,
        names: Mapping[str, Sequence[str]],
        evaluated: Sequence[str] = (),
        truth: Truth | None = None,
        end_round: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.names = names
        self.evaluated = evaluated
        self.truth = truth
        self.end_round = end_round
        self.moments: list[Moment] = []
        self.epoch_losses: list[float] = []
        self.test_scores: Scores | None = None
        self._scores: dict[str, list[Scores]] = {part: [] for part in evaluated}
        self._held_out_nll: list[Tensor] = []
        self._steps: list[tuple[Tensor, list[int]]] = []

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        # One pass over the weights. float16's scaler unscales too late for clipping where the optimizer is fused.
        fused = self.recipe.precision != "16-mixed"
        optimizer = torch.optim.Adam(parameter_groups(self.model.flow, self.recipe), lr=self.recipe.lr, fused=fused)
        schedule = LambdaLR(optimizer, self.recipe.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        features, numbers = batch
        loss = self.model.flow.nll(features).mean()
        self.log("nll", loss, batch_size=len(numbers))
        self._steps.append((loss.detach(), numbers))
        return loss * self.recipe.share(batch_index, len(self.names[TRAIN]))

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Lightning's own refuses fused optimizers in mixed precision, though bfloat16 has no scaler to wait for."""
        norm = torch.nn.utils.clip_grad_norm_(trained_parameters(self.model.flow), self.recipe.clip_norm)
        self.log("gradient_norm", norm)

    def on_train_epoch_end(self) -> None:
        self.epoch_losses.append(self._mean_loss())
        self._steps.clear()
        # Lightning evaluates before it calls this hook.
        if len(self.epoch_losses) % self.recipe.sub_epochs == 0:
            if not self.evaluated:
                self.moments.append(Moment(self.current_epoch + 1, None, None))
            self.end_round()

    def on_validation_epoch_start(self) -> None:
        self._mean_loss()

    def _mean_loss(self) -> float:
        """Looked at once an epoch: every look waits for the GPU. Errors: InputError where a loss is not finite."""
        losses = torch.stack([loss for loss, _ in self._steps])
        if not losses.isfinite().all():
            step = int(losses.isfinite().logical_not().nonzero()[0])
            names = ", ".join(self.names[TRAIN][number] for number in self._steps[step][1])
            raise InputError(
                f"the loss is {losses[step].item()} in epoch {self.current_epoch + 1}, step {step + 1}, of the images"
                f" {names}; look at them, or try a lower learning rate or 32-true"
            )
        return losses.mean().item()

    def validation_step(self, batch: Batch, batch_index: int, dataloader_idx: int = 0) -> None:
        part = self.evaluated[dataloader_idx]
        maps, log_det = self.model.flow.log_likelihood_maps(batch[0])
        scores = score_log_likelihoods(maps, self.model.image_size, backend=self.model.flow.backend)
        self._scores[part].append(Scores(*(value.cpu() for value in scores)))
        if part == HELD_OUT:
            self._held_out_nll.append(negative_log_likelihood(maps, self.model.flow.channels, log_det))

    def on_validation_epoch_end(self) -> None:
        nll = evaluation = None
        if HELD_OUT in self.evaluated:
            nll = torch.cat(self._held_out_nll).mean().item()
            self.log("held_out_nll", nll)
            self.model.calibration = calibrated(
                joined(self._scores[HELD_OUT]), self.names[HELD_OUT], self.recipe.false_alarms
            )
        if self.truth is not None:
            self.test_scores = joined(self._scores[TEST])
            evaluation = self.truth.judge(self.test_scores, self.model.calibration)
            self.log_dict({key: value for key, value in evaluation.as_dict().items() if value is not None})
        self.moments.append(Moment(self.current_epoch + 1, evaluation, nll))
        self._held_out_nll.clear()
        for batches in self._scores.values():
            batches.clear()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[STATE] = {
            "epoch_losses": self.epoch_losses,
            "moments": [asdict(moment) for moment in self.moments],
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own, kept = self.state_dict(), checkpoint["state_dict"]
        # The features, already computed, are of these.
        if not all(torch.equal(own[key].cpu(), kept[key].cpu()) for key in own if key.startswith("model.extractor.")):
            raise InputError("the extractor's weights are not those that the run began with; give the same to resume")
        state = checkpoint[STATE]
        self.epoch_losses = list(state["epoch_losses"])
        self.moments = [
            Moment(m["epoch"], m["evaluation"] and Evaluation(**m["evaluation"]), m["held_out_nll"])
            for m in state["moments"]
        ]
        torch.set_rng_state(state["random"])
        if state["random_cuda"]:
            torch.cuda.set_rng_state_all(state["random_cuda"])


class FeatureDataModule(L.LightningDataModule):
    """Features of images, computed once by ``model`` (and standardised by it, where it does that).

    ``images``: of TRAIN and, where they are, of HELD_OUT and TEST. ``cache``: the folder of a FeatureCache of
    ``cache_dtype``, used and, where it is not whole, built; None: they are kept in memory.
    """

    def __init__(
        self,
        model: MSFlow,
        images: Mapping[str, Images],
        recipe: Recipe,
        workers: int = 0,
        cache: Path | None = None,
        cache_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        self.model = model
        self.images = images
        self.recipe = recipe
        self.workers = workers
        self.cache = cache
        self.cache_dtype = cache_dtype
        self.features: dict[str, Features] = {}

    @property
    def total(self) -> int:
        """How many images have their features computed."""
        return sum(len(images) for images in self.images.values())

    @property
    def evaluated(self) -> list[str]:
        """What is scored after each meta epoch, in the order of the loaders."""
        return [part for part in self.images if part != TRAIN]

    def compute(self, progress: Progress = lambda done: None, say: Callable[[str], None] = lambda line: None) -> None:
        """Runs the extractor over all images, once; ``say`` is told what a cache costs before it is built.

        Errors: as FeatureCache's.
        """
        if self.cache is None:
            self.features.update(self._kept(progress))
        else:
            self.features.update(self._cached(self.cache, progress, say))

    def _kept(self, progress: Progress) -> dict[str, list[Tensor]]:
        before = 0
        features = {}
        for part, images in self.images.items():
            here = partial(_advance, progress, before)
            features[part] = pooled_features(self.model, images, 16, self.workers, here)
            before += len(images)
        if self.model.standardiser is not None:
            # One that came with trained weights stays: they know features by its statistics.
            if not self.model.standardiser.fitted:
                self.model.standardiser.fit(features[TRAIN])
            features = {part: self.model.standardiser(levels) for part, levels in features.items()}
        return features

    def _cached(self, folder: Path, progress: Progress, say: Callable[[str], None]) -> dict[str, CachedFeatures]:
        cache = FeatureCache(self.model, self.images, folder, self.cache_dtype)
        if cache.missing():
            say(str(measured(cache)))
            cache.build(self.workers, progress)
        needed = self.total * cache.bytes_per_image
        place = placement(needed, next(self.model.parameters()).device)
        say(f"features: {binary(needed)}, {place}")
        features = {part: CachedFeatures(cache, rows, self.model, place) for part, rows in cache.rows.items()}
        if self.model.standardiser is not None and not self.model.standardiser.fitted:
            self.model.standardiser.fit_batches(features[TRAIN].batches())
        return features

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader(TRAIN, self.recipe.seed)

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        return [self._loader(part) for part in self.evaluated]

    def _loader(self, part: str, shuffle_seed: int | None = None) -> DataLoader[Batch]:
        features = self.features[part]
        ahead = isinstance(features, CachedFeatures) and features.device.type == "cuda"
        return feature_loader(features, self.recipe.batch_size, shuffle_seed, AheadLoader if ahead else DataLoader)


def _advance(progress: Progress, before: int, done: int) -> None:
    progress(before + done)
