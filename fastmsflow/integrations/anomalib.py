"""MSFlow as a model of anomalib, for its Engine, data modules, metrics and exports; needs the ``anomalib`` extra."""

# Without anomalib, pyright takes this file for anomalib.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR

from .. import backend
from ..errors import InputError, UnavailableError
from ..models.msflow import MSFlow
from ..nn.feature_pooling import Pool
from ..recipe import WARM_UP_SHARE, Recipe

try:
    from anomalib import __version__
except ImportError as error:
    raise UnavailableError(
        f"fastmsflow.integrations.anomalib needs {error.name}: pip install 'fastmsflow[anomalib]'"
    ) from error
else:
    VERSION = tuple(int(part) for part in __version__.split(".")[:2])
if VERSION < (2, 3):
    raise UnavailableError(f"anomalib {__version__} is too old, 2.3 is needed: pip install 'fastmsflow[anomalib]'")
from anomalib import LearningType
from anomalib.data import Batch, InferenceBatch
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from torchvision.transforms.v2 import InterpolationMode, Normalize, Resize

__all__ = ["Msflow"]

PUBLISHED_SIZE = (512, 512)


class Msflow(AnomalibModule):  # type: ignore[misc]  # to the checker anomalib has no types: it may be missing
    """Trains the flow of ``msflow``, a fastmsflow.MSFlow: ``Engine().fit(Msflow(), datamodule=...)``.

    ``extractor``, ``pretrained``, ``extractor_weights``, ``pool``: see fastmsflow.MSFlow. ``image_size``: (H, W); by
    default that of the given pre-processor, or else 512x512. ``standardise``: standardizes each feature channel by the
    mean and deviation of the training images, which are measured in a pass before the first epoch that holds all
    features in memory. ``lr``: Adam's learning rate, with the published schedule over the epochs of the Engine (see
    fastmsflow.training.Recipe), whose warm-up takes 12% of them, however few they are; the rate is constant if the
    Engine is given steps or time in place of ``max_epochs``. ``pre_processor``: may resize and crop, but not normalize.
    The others: see AnomalibModule.

    Batches hold images in [0, 1]. ``pred_score`` is the absolute score of fastmsflow.scoring, comparable between images
    as a threshold for all of them needs; the published score is the same 1.0 for every image while the flow fits badly.
    ``anomaly_map`` is the published additive map: from 0, the image's most normal pixel, up to the number of levels.

    Raises: InputError if options, sizes or the pre-processor do not fit, or the loss is not finite.
    """

    model: "_Inference"

    def __init__(
        self,
        extractor: str = "wide_resnet50_2.tv_in1k",
        pretrained: bool = True,
        extractor_weights: str | None = None,
        image_size: tuple[int, int] | None = None,
        pool: Pool = "avg",
        standardise: bool = False,
        lr: float = 1e-4,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        super().__init__(
            self.configure_pre_processor(image_size) if pre_processor is True else pre_processor,
            post_processor,
            evaluator,
            visualizer,
        )
        if extract_transforms_by_type(getattr(self.pre_processor, "transform", None), Normalize):
            raise InputError(
                "the pre-processor normalises images, which the extractor does itself: take its Normalize out"
            )
        given = self.input_size
        size = image_size or given or PUBLISHED_SIZE
        if given is not None and tuple(given) != tuple(size):
            raise InputError(f"image_size is {tuple(size)}, the pre-processor makes {tuple(given)}: leave one out")
        self.lr = Recipe(lr=lr).lr
        self.model = _Inference(
            MSFlow(
                extractor,
                pretrained,
                (size[0], size[1]),
                pool,
                extractor_weights=extractor_weights,
                standardise=standardise,
            )
        )

    @property
    def msflow(self) -> MSFlow:
        """The model that is trained; ``msflow.save`` writes a file for ``fastmsflow predict`` and ``MSFlow.load``."""
        return self.model.msflow

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Returns a pre-processor that resizes to ``image_size`` (H, W), by default 512x512; the extractor normalizes.

        The filter is bicubic, the nearest to fastmsflow's own Lanczos that exists for tensors.
        """
        size = tuple(image_size or PUBLISHED_SIZE)
        return PreProcessor(transform=Resize(size, interpolation=InterpolationMode.BICUBIC, antialias=True))

    @property
    def learning_type(self) -> LearningType:
        """The model learns from good images only."""
        return LearningType.ONE_CLASS

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """The published gradient clipping, and no validation before the first epoch."""
        return {"gradient_clip_val": Recipe.clip_norm, "num_sanity_val_steps": 0}

    def configure_optimizers(self) -> dict[str, Any]:
        """Returns Adam on the flow, with the published schedule if the number of epochs is known."""
        optimizer = Adam(self.msflow.flow.parameters(), lr=self.lr)
        epochs = self.trainer.max_epochs
        if epochs is None or epochs < 1:
            return {"optimizer": optimizer}
        recipe = Recipe(lr=self.lr, meta_epochs=epochs, sub_epochs=1, warm_up_share=WARM_UP_SHARE)
        schedule = LambdaLR(optimizer, recipe.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}

    def on_train_start(self) -> None:
        """Measures the statistics of the training images, unless the training resumes from a checkpoint."""
        if self.msflow.standardiser is None or self.trainer.global_step > 0:
            return
        resize = getattr(self.pre_processor, "transform", None) or nn.Identity()
        batches = [
            [level.cpu() for level in self.msflow.pooled(resize(batch.image.to(self.device)))]
            for batch in cast(Iterable[Any], self.trainer.train_dataloader)
        ]
        self.msflow.standardiser.fit_batches(batches)

    def training_step(self, batch: Batch, *args: object, **options: object) -> Tensor:
        """Returns the mean nll of the batch, in nats. Raises: InputError if the loss is not finite."""
        images = cast(Tensor, batch.image)
        loss = self.msflow.nll(images).mean()
        if not torch.isfinite(loss):
            raise InputError(f"the loss is {loss.item()} in epoch {self.current_epoch + 1}; try a lower learning rate")
        self.log("train_loss", loss.detach(), on_step=True, on_epoch=True, prog_bar=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: Batch, *args: object, **options: object) -> Batch:
        """Returns ``batch`` with ``pred_score`` and ``anomaly_map``."""
        return batch.update(**self.model(batch.image)._asdict())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Records that the file has the extractor's weights, so that reading it needs no others, and the image size."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"] |= {
            "pretrained": False,
            "extractor_weights": None,
            "image_size": self.msflow.image_size,
        }

    def to_onnx(self, *args: Any, **options: Any) -> Any:
        """Exports the model, see AnomalibModule; OpenVINO's files are made from the result.

        Images of another size are resized in the graph, without antialiasing. The graph is plain PyTorch's, since ONNX
        has none of the kernels.
        Raises: UnavailableError if anomalib is older than 2.7.
        """
        if VERSION < (2, 7):
            raise UnavailableError(
                f"the post-processor of anomalib {__version__} has no ONNX form: pip install 'anomalib>=2.7',"
                " or export the model alone by fastmsflow.integrations.export.export_onnx(model.msflow, path)"
            )
        # anomalib's own default, 14, is older than what PyTorch writes.
        options.setdefault("opset_version", 18)
        with backend.use("torch"):
            return super().to_onnx(*args, **options)


class _Inference(nn.Module):
    """The module that anomalib evaluates and exports."""

    def __init__(self, msflow: MSFlow) -> None:
        super().__init__()
        self.msflow = msflow

    def forward(self, images: Tensor) -> InferenceBatch:
        """Scores images (B, 3, H, W) in [0, 1]: ``pred_score`` (B,) and ``anomaly_map`` (B, 1, H, W); see Msflow."""
        scores = self.msflow.scores(images)
        return InferenceBatch(pred_score=scores.absolute_score, anomaly_map=scores.score_map_add[:, None])
