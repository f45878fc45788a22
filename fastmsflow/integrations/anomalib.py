"""MSFlow as a model of anomalib, for its Engine, data modules, metrics and exports; needs the ``anomalib`` extra."""

# Without anomalib, pyright takes this file for anomalib.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

import copy
import operator
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, DistributedSampler

from .. import backend
from ..distributed.process_group import ProcessGroup
from ..errors import InputError, InputWarning, UnavailableError
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
from anomalib import LearningType, models
from anomalib.data import AnomalibDataModule, Batch, InferenceBatch
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.metrics import AUROC, Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.pre_processing.utils.transform import get_exportable_transform
from anomalib.visualization import Visualizer
from torchvision.transforms.v2 import InterpolationMode, Normalize, Resize

from ..nn.antialiased_resize import antialiased

__all__ = ["Msflow"]

PUBLISHED_SIZE = (512, 512)
# Checkpoints of earlier versions have none of these.
LEVEL_OPTIONS = ("layers", "level_strides")

# anomalib's get_model, which its pipelines call, imports class paths of these modules alone.
models.ALLOWED_MODULES.add(__name__)

ImageSize = tuple[int, int] | int


class Msflow(AnomalibModule):  # type: ignore[misc]  # to the checker anomalib has no types: it may be missing
    """Trains the flow of ``msflow``, a fastmsflow.MSFlow: ``Engine().fit(Msflow(), datamodule=...)``.

    ``extractor``, ``pretrained``, ``extractor_weights``, ``pool``, ``layers``, ``level_strides``: see
    fastmsflow.MSFlow. ``image_size``: (H, W), or one number for both; by default that of the given pre-processor, or
    else 512x512. ``standardise``: standardizes each feature channel by the mean and deviation of the training images,
    which all processes measure together in a pass before the first epoch. ``lr``: Adam's learning rate, with the
    published schedule over the epochs of the Engine (see fastmsflow.training.Recipe), whose warm-up takes 12% of them,
    however few they are; the rate is constant if the Engine is given steps or time in place of ``max_epochs``.
    ``pre_processor``: may resize and crop, but not normalize.
    The others: see AnomalibModule; the default evaluator measures image and pixel AUROC in validation too.

    A checkpoint (``ckpt_path``) decides on extractor, layers, image size, pool, standardizing and the pre-processor.

    Batches hold images in [0, 1]. ``pred_score`` is the absolute score of fastmsflow.scoring, comparable between images
    as a threshold for all of them needs; the published score is the same 1.0 for every image while the flow fits badly.
    ``anomaly_map`` is the published additive map: from 0, the image's most normal pixel, up to the number of levels.

    Raises: InputError if options or the pre-processor do not fit, at the first images if the pre-processor makes
    another size than the model's, or if the loss is not finite.
    """

    model: "_Inference"

    def __init__(
        self,
        extractor: str = "wide_resnet50_2.tv_in1k",
        pretrained: bool = True,
        extractor_weights: str | None = None,
        image_size: ImageSize | None = None,
        pool: Pool = "avg",
        standardise: bool = False,
        lr: float = 1e-4,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
        layers: Sequence[int] | None = None,
        level_strides: Sequence[int] | None = None,
    ) -> None:
        named = None if image_size is None else _height_width(image_size)
        super().__init__(
            self.configure_pre_processor(named) if pre_processor is True else pre_processor,
            post_processor,
            evaluator,
            visualizer,
        )
        if extract_transforms_by_type(getattr(self.pre_processor, "transform", None), Normalize):
            raise InputError(
                "the pre-processor normalises images, which the extractor does itself: take its Normalize out"
            )
        self._antialias_exports()
        self.lr = Recipe(lr=lr).lr
        made = self.input_size
        size = named or (PUBLISHED_SIZE if made is None else _height_width(made))
        build = partial(
            MSFlow,
            extractor,
            pretrained,
            pool=pool,
            extractor_weights=extractor_weights,
            standardise=standardise,
            layers=layers,
            level_strides=level_strides,
        )
        try:
            msflow = build(image_size=size)
        except InputError:
            if size in (named, PUBLISHED_SIZE):
                raise
            # anomalib's tiled ensemble reads the metrics of a model for 10x10, which refuses its first images.
            msflow = build(image_size=PUBLISHED_SIZE)
        self.model = _Inference(msflow)

    @property
    def msflow(self) -> MSFlow:
        """The model that is trained; ``msflow.save`` writes a file for ``fastmsflow predict`` and ``MSFlow.load``."""
        return self.model.msflow

    @staticmethod
    def configure_pre_processor(image_size: ImageSize | None = None) -> PreProcessor:
        """Returns a pre-processor that resizes to ``image_size``, by default 512x512; the extractor normalizes.

        The filter is bicubic, the nearest to fastmsflow's own Lanczos that exists for tensors.
        Raises: InputError if ``image_size`` is neither a whole number above 0 nor two of them.
        """
        size = PUBLISHED_SIZE if image_size is None else _height_width(image_size)
        return PreProcessor(transform=Resize(size, interpolation=InterpolationMode.BICUBIC, antialias=True))

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Returns anomalib's default evaluator, with image and pixel AUROC of the validation images as well."""
        tested: Any = AnomalibModule.configure_evaluator().test_metrics
        validated: Any = [
            AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
            AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False),
        ]
        return Evaluator(val_metrics=validated, test_metrics=list(tested))

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
        world = ProcessGroup(self.trainer.global_rank, self.trainer.world_size)
        resize = getattr(self.pre_processor, "transform", None) or nn.Identity()
        features = (
            [level.cpu() for level in self.msflow.pooled(resize(images.to(self.device)))]
            for images in _each_image_once(cast(Iterable[Any], self.trainer.train_dataloader))
        )
        self.msflow.standardiser.fit_batches(features, world)

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
        """Records the model's options, and that the file has the extractor's weights: reading it needs no others."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"] |= {**self._options, "pretrained": False, "extractor_weights": None}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Makes model and pre-processor those of the checkpoint, whose weights are read next.

        Raises: InputError if the checkpoint is another model's.
        """
        saved = checkpoint.get("hyper_parameters", {})
        saved = {**dict.fromkeys(LEVEL_OPTIONS), **saved}
        if missing := [name for name in self._options if name not in saved]:
            raise InputError(
                f"the checkpoint is not one of Msflow, it has no {missing[0]}: name one that Msflow was trained to"
            )
        options = {name: saved[name] for name in self._options}
        # It stays a callback of the trainer where anomalib takes it from the model.
        pre_processor = self.pre_processor
        super().on_load_checkpoint(checkpoint)
        if isinstance(pre_processor, PreProcessor) and "anomalib_pre_processor_config" not in checkpoint:
            pre_processor.transform = self._saved_transform(checkpoint)
        self._antialias_exports()
        datamodule = self._trainer and self._trainer.datamodule
        if isinstance(datamodule, AnomalibDataModule):
            # It resizes by now as the pre-processor did before.
            datamodule.setup()
        if options != self._options:
            self.model = _Inference(MSFlow(pretrained=False, **options)).to(self.device)

    @property
    def _options(self) -> dict[str, Any]:
        """The options that a model must be made with for the weights to fit and to mean the same."""
        config = self.msflow.config
        return {
            "extractor": config["extractor"],
            "image_size": self.msflow.image_size,
            "pool": config["pool"],
            "standardise": config["standardise"],
            **{name: config.get(name) for name in LEVEL_OPTIONS},
        }

    def _saved_transform(self, checkpoint: dict[str, Any]) -> Any:
        """Returns the transform of a checkpoint without a pre-processor, or before anomalib 2.7 put it in a place."""
        enabled = checkpoint.get("anomalib_components_enabled", {}).get("pre_processor", True)
        saved = enabled and checkpoint["hyper_parameters"].get("pre_processor", True)
        if saved is True:
            saved = self.configure_pre_processor(checkpoint["hyper_parameters"]["image_size"])
        return saved.transform if saved else None

    def _antialias_exports(self) -> None:
        """Has exported files resize as the Engine does; anomalib's own form resizes without antialiasing."""
        if isinstance(self.pre_processor, PreProcessor):
            transform = self.pre_processor.transform
            self.pre_processor.export_transform = transform and antialiased(transform, get_exportable_transform)

    def to_onnx(
        self,
        export_root: str | Path,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **options: Any,
    ) -> Any:
        """Exports the model, see AnomalibModule; OpenVINO's files are made from the result.

        Images of another size are resized in the graph as by the Engine. The graph is plain PyTorch's, since ONNX has
        none of the kernels.
        Raises: UnavailableError if anomalib is older than 2.7.
        """
        if VERSION < (2, 7):
            raise UnavailableError(
                f"the post-processor of anomalib {__version__} has no ONNX form: pip install 'anomalib>=2.7',"
                " or export the model alone by fastmsflow.integrations.export.export_onnx(model.msflow, path)"
            )
        resizes = extract_transforms_by_type(getattr(self.pre_processor, "transform", None), Resize)
        if input_size is None and any(len(resize.size or ()) == 1 for resize in resizes):
            warnings.warn(
                "the pre-processor resizes by the shorter side, and the graph will do so for square images only: give"
                " input_size, or resize to (height, width)",
                InputWarning,
                stacklevel=2,
            )
        # anomalib's own default, 14, is older than what PyTorch writes.
        options.setdefault("opset_version", 18)
        with backend.use("torch"):
            return super().to_onnx(export_root, model_file_name, input_size, **options)


class _Inference(nn.Module):
    """The module that anomalib evaluates and exports."""

    def __init__(self, msflow: MSFlow) -> None:
        super().__init__()
        self.msflow = msflow

    def forward(self, images: Tensor) -> InferenceBatch:
        """Scores images (B, 3, H, W) in [0, 1]: ``pred_score`` (B,) and ``anomaly_map`` (B, 1, H, W); see Msflow."""
        scores = self.msflow.scores(images)
        return InferenceBatch(pred_score=scores.absolute_score, anomaly_map=scores.score_map_add[:, None])


def _height_width(image_size: Any) -> tuple[int, int]:
    """Returns (H, W). Raises: InputError if ``image_size`` is neither a whole number above 0 nor two of them."""
    try:
        sides = image_size if isinstance(image_size, Iterable) else (image_size, image_size)
        height, width = map(operator.index, sides)
    except (TypeError, ValueError):
        height = width = 0
    if min(height, width) < 1:
        raise InputError(f"image_size is {image_size!r}; give the pixels of a side, or (height, width)")
    return height, width


def _each_image_once(loader: Iterable[Any]) -> Iterator[Tensor]:
    """Yields this process's share of the training images, in batches (B, 3, H, W)."""
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    left = sys.maxsize
    if isinstance(sampler, DistributedSampler):
        # The sampler repeats images at the end until all processes have as many.
        left = len(range(sampler.rank, len(cast(Sized, sampler.dataset)), sampler.num_replicas))
    # The training has an iterator over this loader by now: workers that persist would be taken from it.
    again = copy.copy(loader)
    if isinstance(again, DataLoader):
        again._iterator = None
    with _random_numbers_kept(getattr(loader, "generator", None), getattr(sampler, "generator", None)):
        for batch in again:
            yield batch.image[:left]
            left = max(left - len(batch.image), 0)


@contextmanager
def _random_numbers_kept(*generators: torch.Generator | None) -> Iterator[None]:
    """Sets PyTorch's random numbers and those of ``generators`` back afterwards; they are the same in every block."""
    used = [torch.default_generator, *(generator for generator in generators if generator is not None)]
    states = [generator.get_state() for generator in used]
    try:
        for generator in used:
            generator.manual_seed(0)
        yield
    finally:
        for generator, state in zip(used, states, strict=True):
            generator.set_state(state)
