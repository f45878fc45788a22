"""The Lightning side: what a step, an evaluation and the schedule are."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..distributed.process_group import SINGLE_PROCESS, ProcessGroup
from ..errors import InputError
from ..evaluation.evaluator import Calibrator, Evaluator, TestResult
from ..evaluation.ground_truth import GroundTruth
from ..evaluation.results import Evaluation
from ..evaluation.score_map_store import ScoreMapStore
from ..models.msflow import MSFlow
from ..recipe import Recipe
from ..scoring import shown_map
from .datamodule import HELD_OUT, TRAIN, TrainingData
from .loaders import Batch
from .loss_monitor import LossMonitor
from .parameter_groups import parameter_groups, trained_parameters

STATE = "fastmsflow"
# Lightning's key for the state of shards as version 0.1 wrote it: the name that ShardTrainingData had.
OLD_SHARD_STATE = "ShardSource"
# Steps after which losses are looked at: every look waits for the GPU and for the other processes.
LOOK_EVERY = 50


@dataclass(frozen=True)
class EpochResult:
    """What was measured after ``epoch`` passes over the training images."""

    epoch: int
    evaluation: Evaluation | None
    """On the test set, where there is one."""
    held_out_nll: float | None
    """Mean over the held-out images, nats, where there are any."""


class MSFlowLightningModule(L.LightningModule):
    """Trains ``model.flow`` on batches of features, or of images; after each meta epoch scores the held-out images and
    the test set, where they are, and then calls ``end_round``.

    ``names``: of the images of TRAIN and HELD_OUT, by number, for errors. ``maps_in``: the folder where the last
    round's maps to show go, in a temporary file; None: they are not kept. ``world``: the processes that train together.

    What it logs as a step's ``nll`` is, of several processes, the first one's part of the batch; ``epoch_losses`` are
    of all of them.
    """

    def __init__(
        self,
        model: MSFlow,
        recipe: Recipe,
        names: Mapping[str, Sequence[str]],
        evaluated: Sequence[str] = (),
        truth: GroundTruth | None = None,
        end_round: Callable[[], None] = lambda: None,
        maps_in: Path | None = None,
        world: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.names = names
        self.evaluated = evaluated
        self.truth = truth
        self.end_round = end_round
        self.moments: list[EpochResult] = []
        self.epoch_losses: list[float] = []
        self.maps_in = maps_in
        self.tested: TestResult | None = None
        """In the last round."""
        self._tally: Evaluator | None = None
        self._calibrator: Calibrator | None = None
        self._held_out_nll: list[Tensor] = []
        self._world = world
        self._losses = LossMonitor(self._world, recipe.precision == "16-mixed")
        # The extractor is nobody's to learn, and the same everywhere.
        fixed = [name for name in self.state_dict() if not name.startswith("model.flow.")]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, fixed)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        # One pass over the weights. float16's scaler unscales too late for clipping where the optimizer is fused.
        fused = self.recipe.precision != "16-mixed"
        optimizer = torch.optim.Adam(parameter_groups(self.model.flow, self.recipe), lr=self.recipe.lr, fused=fused)
        schedule = LambdaLR(optimizer, self.recipe.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        _, numbers, share = batch
        loss = self.model.flow.nll(self._features(batch)).mean()
        self.log("nll", loss, batch_size=len(numbers))
        self._losses.add(loss, share, numbers)
        return loss * share * self.recipe.share(batch_index, self.source.epoch_images)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_index: int) -> None:
        if self._losses.steps % LOOK_EVERY == 0:
            self._look()

    @property
    def source(self) -> TrainingData:
        """Of what it is trained and judged on."""
        return cast(TrainingData, self.trainer.datamodule)  # type: ignore[attr-defined]

    def _look(self) -> None:
        self._losses.look(self.current_epoch, self.names[TRAIN])

    def _features(self, batch: Batch) -> list[Tensor]:
        """In float32, as kept ones are, whatever the flow's steps are in."""
        images = batch[0]
        if not isinstance(images, Tensor):
            return images
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return self.model.features(images.contiguous(memory_format=torch.channels_last))

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Lightning's own refuses fused optimizers in mixed precision, though bfloat16 has no scaler to wait for."""
        norm = torch.nn.utils.clip_grad_norm_(trained_parameters(self.model.flow), self.recipe.clip_norm)
        self.log("gradient_norm", norm)
        self._losses.add_gradient_norm(norm)

    def on_train_epoch_end(self) -> None:
        self._look()
        self.epoch_losses.append(self._losses.mean())
        # Lightning evaluates before it calls this hook.
        if len(self.epoch_losses) % self.recipe.sub_epochs == 0:
            if not self.evaluated:
                self.moments.append(EpochResult(self.current_epoch + 1, None, None))
            self.end_round()

    def on_validation_epoch_start(self) -> None:
        self._look()
        # Before the next ones take their place in memory.
        self.tested = None
        if HELD_OUT in self.evaluated:
            self._calibrator = Calibrator(self.names[HELD_OUT], self._world, self.source.images_of(HELD_OUT))
        if self.truth is not None:
            shown = shown_map(self._calibrator is not None or self.model.calibration is not None)
            self._tally = Evaluator(self.truth, len(self.model.flow.channels), shown, self._spill(), self._world)

    def _spill(self) -> ScoreMapStore | None:
        """Where this round may be the last."""
        last = self.current_epoch + 1 == self.recipe.epochs or self.recipe.patience is not None
        return ScoreMapStore(self.maps_in, self._world) if self.maps_in is not None and last else None

    def validation_step(self, batch: Batch, batch_index: int, dataloader_idx: int = 0) -> None:
        numbers = batch[1]
        on_device, nll = self.model.scores_and_nll(self._features(batch))
        scores = on_device.to_cpu()
        if self.evaluated[dataloader_idx] == HELD_OUT:
            assert self._calibrator is not None
            self._calibrator.add(numbers, scores)
            self._held_out_nll.append(nll)
        else:
            assert self._tally is not None and self.truth is not None
            self._tally.add(numbers, scores, self.truth.masks(numbers) if self.truth.has_masks else None)

    def on_validation_epoch_end(self) -> None:
        nll = evaluation = None
        if self._tally is not None:
            self._tally.complete()
        if self._calibrator is not None:
            nll = self._mean_held_out_nll()
            self.log("held_out_nll", nll)
            self.model.calibration = self._calibrator.calibration(self.recipe.false_alarms)
        if self._tally is not None:
            self.tested = self._tally.judge(self.model.calibration)
            evaluation = self.tested.evaluation
            self.log_dict({key: value for key, value in evaluation.as_dict().items() if value is not None})
        self.moments.append(EpochResult(self.current_epoch + 1, evaluation, nll))
        self._tally = self._calibrator = None

    def _mean_held_out_nll(self) -> float:
        """Over the images of all processes."""
        own = torch.cat(self._held_out_nll).double() if self._held_out_nll else torch.empty(0)
        self._held_out_nll.clear()
        everyone = self._world.all_gather((own.sum().item(), len(own)))
        if not any(count for _, count in everyone):
            raise InputError("not one held-out image can be read; mend them, or hold others out (--seed)")
        return sum(of_one for of_one, _ in everyone) / sum(count for _, count in everyone)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._look()
        checkpoint[STATE] = {
            "epoch_losses": self.epoch_losses,
            "losses": self._losses.state(),
            "moments": [asdict(moment) for moment in self.moments],
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own, kept = self.state_dict(), checkpoint["state_dict"]
        # The features, already computed, are of these.
        if not all(torch.equal(own[key].cpu(), kept[key].cpu()) for key in own if key.startswith("model.extractor.")):
            raise InputError("the extractor's weights are not those that the run began with; give the same to resume")
        if OLD_SHARD_STATE in checkpoint:
            self.source.load_state_dict(checkpoint[OLD_SHARD_STATE])
        state = checkpoint[STATE]
        self.epoch_losses = list(state["epoch_losses"])
        self._losses.load(state["losses"])
        self.moments = [
            EpochResult(m["epoch"], m["evaluation"] and Evaluation.from_dict(m["evaluation"]), m["held_out_nll"])
            for m in state["moments"]
        ]
        torch.set_rng_state(state["random"])
        if torch.cuda.is_available():
            # Of as many GPUs as are here: the machine may be another.
            torch.cuda.set_rng_state_all(state["random_cuda"][: torch.cuda.device_count()])
