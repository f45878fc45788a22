"""Defines training steps, evaluations and the learning-rate schedule for Lightning."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..distributed.process_group import SINGLE_PROCESS, ProcessGroup
from ..errors import InputError
from ..evaluation.evaluator import Calibrator, Evaluator, TestResult
from ..evaluation.ground_truth import GroundTruth
from ..evaluation.results import Evaluation
from ..evaluation.score_map_store import ScoreMapStore
from ..models.msflow import MSFlow
from ..recipe import Recipe
from ..scoring import Scores, shown_map
from ..state_dicts import refuse_other_permutations
from .datamodule import HELD_OUT, TEST, TRAIN, TrainingData
from .loaders import Batch
from .loss_monitor import LossMonitor
from .lr_schedule import lr_schedule
from .optimizer import Adam
from .parameter_groups import parameter_groups
from .state_format import STATE, refuse_other_shapes
from .tile_blender import TileBlender
from .training_result import EpochResult

RUN_STATE = "the run's state"
# Lightning's key for the state of shards as version 0.1 wrote it: the name that ShardTrainingData had.
OLD_SHARD_STATE = "ShardSource"
# Steps between checks of the losses: each check waits for the GPU and for the other processes.
CHECK_LOSSES_EVERY = 50


class MSFlowLightningModule(L.LightningModule):
    """Trains ``model.flow`` on batches of features or images, and evaluates the model after each meta epoch.

    An evaluation scores the held-out images and the test set, if there are any; then ``on_round_end`` is called.
    ``names``: the names of the images, or tiles, of TRAIN and of the images of HELD_OUT by number, for error messages.
    ``ground_truth``: of the test set. ``maps_folder``: where a temporary file takes the last evaluation's maps to show;
    None: they are not stored. ``world``: the processes that train together.

    The ``nll`` that is logged for a step is that of this process's part of the batch; ``epoch_losses`` are means over
    all processes.
    """

    def __init__(
        self,
        model: MSFlow,
        recipe: Recipe,
        names: Mapping[str, Sequence[str]],
        *,
        ground_truth: GroundTruth | None = None,
        on_round_end: Callable[[], None] = lambda: None,
        maps_folder: Path | None = None,
        world: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.names = names
        self.ground_truth = ground_truth
        self.on_round_end = on_round_end
        self.epoch_results: list[EpochResult] = []
        self.epoch_losses: list[float] = []
        self.maps_folder = maps_folder
        self.test_result: TestResult | None = None
        """The test set's result in the last evaluation."""
        self._evaluator: Evaluator | None = None
        self._calibrator: Calibrator | None = None
        self._blenders: dict[str, TileBlender] = {}
        self._held_out_nlls: list[Tensor] = []
        self._held_out_nll: float | None = None
        self._world = world
        self._losses = LossMonitor(world, recipe.precision == "16-mixed")
        # The extractor is frozen, and equal in all processes.
        fixed = [name for name in self.state_dict() if not name.startswith("model.flow.")]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, fixed)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        # A fused optimizer is faster, but float16's scaler would unscale its gradients only after the clipping.
        fused = self.recipe.precision != "16-mixed"
        optimizer = Adam(parameter_groups(self.model.flow, self.recipe), lr=self.recipe.lr, fused=fused)
        schedule = lr_schedule(optimizer, self.recipe)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        loss = self.model.flow.nll(self._features(batch), batch.offsets).mean()
        self.log("nll", loss, batch_size=len(batch.numbers))
        self._losses.add(loss, batch.weight, batch.numbers)
        return loss * batch.weight * self.recipe.share(batch_index, self.source.epoch_images)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_index: int) -> None:
        if self._losses.steps % CHECK_LOSSES_EVERY == 0:
            self._check_losses()

    @property
    def source(self) -> TrainingData:
        """The data that the model is trained and evaluated on."""
        return cast(TrainingData, self.trainer.datamodule)  # type: ignore[attr-defined]

    def _check_losses(self) -> None:
        self._losses.check(self.current_epoch, self.names[TRAIN])

    def _features(self, batch: Batch) -> list[Tensor]:
        """Returns the batch's features; those of images are computed in float32, whatever the flow's precision is."""
        images = batch.inputs
        if not isinstance(images, Tensor):
            return images
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return self.model.features(images.contiguous(memory_format=torch.channels_last), fused=True)

    def configure_gradient_clipping(self, optimizer: Optimizer, *_: Any, **__: Any) -> None:
        """Clips the gradient norm; Lightning itself refuses to with a fused optimizer in mixed precision, though
        bfloat16 has no gradient scaler."""
        trained = [parameter for parameter in self.model.flow.parameters() if parameter.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trained, self.recipe.clip_norm)
        self.log("gradient_norm", norm)
        self._losses.add_gradient_norm(norm)

    def on_train_epoch_end(self) -> None:
        self._check_losses()
        self.epoch_losses.append(self._losses.mean())
        # Lightning evaluates before it calls this hook.
        if len(self.epoch_losses) % self.recipe.sub_epochs == 0:
            if not self.source.evaluated:
                self.epoch_results.append(EpochResult(self.current_epoch + 1, None, None))
            self.on_round_end()

    def on_validation_epoch_start(self) -> None:
        self._check_losses()
        # Frees the memory of the previous result.
        self.test_result = None
        tiles = {split: self.source.tiles_of(split) for split in self.source.evaluated}
        self._blenders = {split: TileBlender(of, self.model.flow.backend) for split, of in tiles.items() if of}
        if HELD_OUT in self.source.evaluated:
            self._calibrator = Calibrator(self.names[HELD_OUT], self._world, self.source.images_of(HELD_OUT))

    def _begin_test(self) -> None:
        """Sets the thresholds by the held-out images, which come first, and then judges the test images at them.

        All processes call this after their last held-out image.
        """
        if self._calibrator is not None:
            self._held_out_nll = self._mean_held_out_nll()
            self.model.calibration = self._calibrator.calibration(self.recipe.false_alarms, self.recipe.false_pixels)
            self._calibrator = None
        if self.ground_truth is not None:
            may_be_last = self.current_epoch + 1 == self.recipe.epochs or self.recipe.patience is not None
            folder = self.maps_folder if may_be_last else None
            self._evaluator = Evaluator(
                self.ground_truth,
                len(self.model.flow.channels),
                calibration=self.model.calibration,
                map_kind=shown_map(self.model.calibration is not None),
                maps=None if folder is None else ScoreMapStore(folder, self._world),
                world=self._world,
            )

    def validation_step(self, batch: Batch, batch_index: int, dataloader_idx: int = 0) -> None:
        split, features = self.source.evaluated[dataloader_idx], self._features(batch)
        if split == TEST and self._evaluator is None:
            self._begin_test()
        if split in self._blenders:
            maps, nll = self.model.flow.log_likelihoods_and_nll(features, batch.offsets)
            for number, scores in self._blenders[split].add(batch.numbers, maps):
                self._add_scores(split, [number], scores.to_cpu())
        else:
            scores, nll = self.model.flow.scores_and_nll(features, self.model.image_size)
            self._add_scores(split, batch.numbers, scores.to_cpu())
        if split == HELD_OUT:
            self._held_out_nlls.append(nll)

    def _add_scores(self, split: str, numbers: list[int], scores: Scores) -> None:
        if split == HELD_OUT:
            assert self._calibrator is not None
            self._calibrator.add(numbers, scores)
        else:
            assert self._evaluator is not None and self.ground_truth is not None
            masks = self.ground_truth.load_masks(numbers) if self.ground_truth.has_masks else None
            self._evaluator.add(numbers, scores, masks)

    def on_validation_epoch_end(self) -> None:
        evaluation = None
        if self._evaluator is None:
            # This process has no test image.
            self._begin_test()
        if self._evaluator is not None:
            self._evaluator.complete()
        if self._held_out_nll is not None:
            self.log("held_out_nll", self._held_out_nll)
        if self._evaluator is not None:
            self.test_result = self._evaluator.result()
            evaluation = self.test_result.evaluation
            self.log_dict({key: value for key, value in evaluation.as_dict().items() if value is not None})
        self.epoch_results.append(EpochResult(self.current_epoch + 1, evaluation, self._held_out_nll))
        self._evaluator = self._held_out_nll = None

    def _mean_held_out_nll(self) -> float:
        """Returns the mean over the images, or tiles, of all processes."""
        own = torch.cat(self._held_out_nlls).double() if self._held_out_nlls else torch.empty(0)
        self._held_out_nlls.clear()
        totals, counts = zip(*self._world.all_gather((own.sum().item(), len(own))), strict=True)
        if not any(counts):
            raise InputError("not one held-out image can be read; mend them, or hold others out (--seed)")
        return sum(totals) / sum(counts)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._check_losses()
        checkpoint[STATE] = {
            "epoch_losses": self.epoch_losses,
            "losses": self._losses.state(),
            "moments": [asdict(result) for result in self.epoch_results],
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own, saved = self.state_dict(), checkpoint["state_dict"]
        # The features have been computed by these weights already.
        if not all(torch.equal(own[key].cpu(), saved[key].cpu()) for key in own if key.startswith("model.extractor.")):
            raise InputError("the extractor's weights are not those that the run began with; give the same to resume")
        refuse_other_permutations(RUN_STATE, saved)
        parameters = [p for group in parameter_groups(self.model.flow, self.recipe) for p in group["params"]]
        refuse_other_shapes(RUN_STATE, checkpoint["optimizer_states"][0], parameters)
        if OLD_SHARD_STATE in checkpoint:
            self.source.load_state_dict(checkpoint[OLD_SHARD_STATE])
        state = checkpoint[STATE]
        self.epoch_losses = list(state["epoch_losses"])
        self._losses.load(state["losses"])
        self.epoch_results = [
            EpochResult(m["epoch"], m["evaluation"] and Evaluation.from_dict(m["evaluation"]), m["held_out_nll"])
            for m in state["moments"]
        ]
        torch.set_rng_state(state["random"])
        if torch.cuda.is_available():
            # Another machine may have fewer GPUs.
            torch.cuda.set_rng_state_all(state["random_cuda"][: torch.cuda.device_count()])
