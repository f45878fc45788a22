"""The model: extractor, pool and flow."""

import copy
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import backend as backends
from ..backend import Backend
from ..calibration import Calibration
from ..errors import InputError
from ..nn.cuda_graph import CudaGraphCache, Outputs, WeightAddresses
from ..nn.feature_extractor import FeatureExtractor
from ..nn.feature_pooling import FeatureNormalizer, Pool, check_pool, pool_features
from ..nn.weight_cache import invalidations
from ..reference.clamp_forms import ClampForm
from ..reference.likelihood import negative_log_likelihood
from ..scoring import TOP_K, Scores, score_log_likelihoods
from ..state_dicts import refuse_misfit
from .checkpoint import OfficialLayout, built_from, read_checkpoint, write_checkpoint
from .hub import HubModel
from .multi_scale_flow import MultiScaleFlow

__all__ = ["MSFlow", "MultiScaleFlow", "Prediction"]


class Prediction(NamedTuple):
    """Scores and maps of a batch, float32 or better; see fastmsflow.scoring for their formulas."""

    score: Tensor
    """(B,) the published image score, in [0, 1]."""
    log_score: Tensor
    """(B,) the same in log space, in nats: does not saturate."""
    score_map_add: Tensor
    """(B, H, W) for localisation; 0: the image's most normal pixel. ``Scores.absolute_map`` compares images."""
    score_map_mul: Tensor
    """(B, H, W) for detection, in [0, 1]."""
    absolute_score: Tensor
    """(B,) in nats, not relative to the image itself: comparable between images and days."""


class MSFlow(nn.Module, HubModel, library_name="fastmsflow", paper_url="https://arxiv.org/abs/2308.15300"):
    """Frozen extractor, pool and flow: images -> likelihood, scores and maps.

    ``extractor``: any timm backbone that serves features; ``pretrained``, ``extractor_weights``: see
    fastmsflow.nn.feature_extractor.FeatureExtractor. ``image_size``: (H, W). ``pool``: ``"avg"``, ``"max"`` or
    ``"none"``.
    ``standardise``: per-channel standardisation of the pooled features (off in the published recipe; fit it with
    ``standardiser.fit``). The others: see MultiScaleFlow.
    Errors: InputError where an argument is not one of these or weights do not fit; UnavailableError where pretrained
    weights cannot be had.
    """

    image_size: tuple[int, int]
    pool: Pool
    extractor: FeatureExtractor
    standardiser: FeatureNormalizer | None
    flow: MultiScaleFlow
    calibration: Calibration | None
    """What good images score, where some were held out of training; saved with the model."""
    made_for_inference: bool
    """Whether ``for_inference`` returned this model."""

    def __init__(
        self,
        extractor: str = "wide_resnet50_2.tv_in1k",
        pretrained: bool = True,
        image_size: tuple[int, int] = (512, 512),
        pool: Pool = "avg",
        condition_channels: Sequence[int] = (64, 64, 64),
        blocks: Sequence[int] = (2, 5, 8),
        clamp: float = 1.9,
        backend: Backend = "auto",
        clamp_form: ClampForm = "tanh",
        extractor_weights: str | Path | None = None,
        standardise: bool = False,
    ) -> None:
        super().__init__()
        if min(image_size) < 32:
            raise InputError(f"image_size {tuple(image_size)}: the coarsest stride is 32; give at least 32x32")
        self.image_size = (int(image_size[0]), int(image_size[1]))
        self.pool = check_pool(pool)
        self.extractor = FeatureExtractor(extractor, pretrained, extractor_weights, self.image_size)
        channels = self.extractor.channels
        self.standardiser = FeatureNormalizer(channels) if standardise else None
        self.flow = MultiScaleFlow(channels, condition_channels, blocks, clamp, backend, clamp_form)
        self.calibration = None
        self._replay, self._places = CudaGraphCache(), WeightAddresses()
        self.made_for_inference = False

    @property
    def config(self) -> dict[str, Any]:
        """What ``load`` needs to build this model again, JSON-able."""
        return {
            "extractor": self.extractor.name,
            "image_size": list(self.image_size),
            "pool": self.pool,
            "standardise": self.standardiser is not None,
            "flow": self.flow.config,
            "official_layout": self.flow.official_layout and self.flow.official_layout._asdict(),
            "calibration": self.calibration and self.calibration.as_dict(),
        }

    def pooled(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> pooled features (B, C_l, H_l, W_l) per level, before any standardisation.

        Errors: InputError where images are not floating, not of this shape or not of ``image_size``.
        """
        if tuple(images.shape[-2:]) != self.image_size:
            raise InputError(f"images are {tuple(images.shape[-2:])}; this model takes {self.image_size}: resize them")
        backend = self.flow.backend
        # An extractor of the caller's own takes images alone.
        features = self.extractor(images) if backend == "auto" else self.extractor(images, backend)
        return pool_features(features, self.pool)

    def features(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> what the flow takes: (B, C_l, H_l, W_l) per level, without gradient.

        Replays a CUDA graph as ``predict`` does. Errors: as ``pooled``'s.
        """
        return list(self._replayed(self._features, [images]))

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> (z per level, log_det (B,)). Errors: as ``pooled``'s."""
        return self.flow(self.features(images))

    def nll(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> (B,), see MultiScaleFlow.nll. Errors: as ``pooled``'s."""
        return self.flow.nll(self.features(images))

    def scores(self, images: Tensor, top_k: float = TOP_K) -> Scores:
        """Images (B, 3, H, W) in [0, 1] -> scores and maps before any comparison between images.

        ``top_k``: share of the pixels that the image's scores average. Replays a CUDA graph as ``predict`` does.
        Errors: as ``pooled``'s, and InputError where ``top_k`` is not in [0, 1].
        """
        return Scores(*self._replayed(self._scores, [images], top_k))

    def scores_of_features(self, features: Sequence[Tensor], top_k: float = TOP_K) -> Scores:
        """``scores`` from what ``features`` returned, (B, C_l, H_l, W_l) per level."""
        return Scores(*self._replayed(self._scores_of_features, features, top_k))

    def scores_and_nll(self, features: Sequence[Tensor]) -> tuple[Scores, Tensor]:
        """Features (B, C_l, H_l, W_l) per level -> ``scores_of_features`` and ``MultiScaleFlow.nll`` (B,), in one pass.

        Never replays a CUDA graph, so that it suits a flow that is being trained.
        """
        maps, log_det = self.flow.log_likelihood_maps(features)
        return self._scores_of_maps(maps), negative_log_likelihood(maps, self.flow.channels, log_det)

    @torch.no_grad()
    def predict(self, images: Tensor, top_k: float = TOP_K) -> Prediction:
        """Images (B, 3, H, W) in [0, 1] -> scores and maps at ``image_size``. Arguments and errors: as ``scores``'s.

        On a GPU, in eval mode and without gradients, the second batch of a shape is recorded in a CUDA graph, which it
        and all later ones replay: keep shapes the same, and call from one thread at a time. What is returned is not
        written to again.
        """
        return Prediction(*self._replayed(self._predict, [images], top_k))

    def _replayed(self, function: Callable[..., Outputs], inputs: Sequence[Tensor], *options: float) -> Outputs:
        """``function(*options, *inputs)``, by a graph where one serves."""
        call = partial(function, *options)
        if self.training or torch.compiler.is_compiling():
            return call(*inputs)
        return self._replay(call, inputs, lambda: (function.__name__, options, *self._read_by_graphs()))

    def _read_by_graphs(self) -> tuple[Hashable, ...]:
        # Weights where they lie, what was kept of them (nn.kept) as it was, and kernels of the backend.
        return self._places.of(self), invalidations(), backends.override(), self.flow.backend

    def _features(self, images: Tensor) -> Outputs:
        pooled = self.pooled(images)
        if self.standardiser is not None:
            pooled = self.standardiser(pooled)
        # for_inference gives extractor and flow dtypes of their own.
        return tuple(level.to(self.flow.dtype) for level in pooled)

    def _scores_of_features(self, top_k: float, *features: Tensor) -> Scores:
        return self._scores_of_maps(self.flow.log_likelihoods(features), top_k)

    def _scores_of_maps(self, maps: Sequence[Tensor], top_k: float = TOP_K) -> Scores:
        return score_log_likelihoods(maps, self.image_size, top_k, self.flow.backend)

    def _scores(self, top_k: float, images: Tensor) -> Scores:
        return self._scores_of_features(top_k, *self._features(images))

    def _predict(self, top_k: float, images: Tensor) -> Outputs:
        s = self._scores(top_k, images)
        return s.score, s.log_score, s.score_map_add, s.score_map_mul, s.absolute_score

    def for_inference(self, dtype: torch.dtype = torch.float32) -> "MSFlow":
        """A copy that predicts faster and no longer trains: batch norms folded into convolutions, these fused with
        their ReLUs and residuals, weights in ``dtype`` and in channels-last memory, no gradients.

        Half precisions are for GPUs; sums are in float32 all the same. float16 keeps scores nearest (measured in
        benchmarks/NOTES.md); what exceeds its range, 65504, becomes inf and the score inf or NaN, unless cuDNN's ReLU
        takes a NaN for 0. With bfloat16 the extractor still is in float16: else its features move by a tenth.
        """
        result = copy.deepcopy(self).eval().requires_grad_(False)
        result.extractor.fold_batch_norms(self.image_size)
        result.extractor.fuse_convolutions(self.image_size)
        result.made_for_inference = True
        result.to(dtype=dtype).to(memory_format=torch.channels_last)
        if dtype == torch.bfloat16:
            result.extractor.to(torch.float16)
        if result.standardiser is not None:
            result.standardiser = copy.deepcopy(self.standardiser)
        return result

    def train(self, mode: bool = True) -> "MSFlow":
        """As any module's; the extractor stays in eval mode, and recorded graphs are dropped."""
        self._replay.clear()
        return super().train(mode)

    def _apply(self, *args: Any, **options: Any) -> "MSFlow":
        """Moves to a device or dtype leave the graphs behind."""
        self._replay.clear()
        return super()._apply(*args, **options)

    def save(self, path: str | Path, **notes: Any) -> None:
        """Writes everything needed to predict, extractor included, as one safetensors file; ``notes`` go into its
        configuration under ``"notes"``. Errors: InputError for what ``for_inference`` returned."""
        if self.made_for_inference:
            raise InputError("for_inference has merged weights of this copy; save the model that it was made from")
        write_checkpoint(path, self.state_dict(), {**self.config, "notes": notes})

    @classmethod
    def load(cls, path: str | Path, backend: Backend = "auto") -> "MSFlow":
        """Reads what ``save`` or ``fastmsflow convert`` wrote, in eval mode on the CPU.

        A converted official file holds flow weights only, unless it was given its extractor's: these come from timm.
        Errors: InputError naming the keys that do not fit, UnavailableError where weights cannot be downloaded.
        """
        tensors, config = read_checkpoint(path)
        whole = any(key.startswith("extractor.") for key in tensors)
        with built_from(path):
            model = cls.from_config(config, pretrained=not whole, backend=backend)
        own = model.state_dict()
        if not whole:
            tensors |= {key: value for key, value in own.items() if key.startswith("extractor.")}
        refuse_misfit("the model its configuration describes", path, own, tensors)
        model.load_state_dict(tensors)
        return model.eval()

    @classmethod
    def from_config(
        cls,
        config: dict[str, Any],
        pretrained: bool,
        extractor_weights: str | Path | None = None,
        backend: Backend = "auto",
    ) -> "MSFlow":
        """A new model of the shape that ``config`` (see the property) describes. Errors: as the constructor's."""
        flow = config["flow"]
        model = cls(
            config["extractor"],
            pretrained,
            tuple(config["image_size"]),
            config["pool"],
            flow["condition_channels"],
            flow["blocks"],
            flow["clamp"],
            backend,
            flow["clamp_form"],
            extractor_weights,
            config["standardise"],
        )
        model.flow.official_layout = OfficialLayout.from_config(config)
        calibration = config.get("calibration")
        model.calibration = calibration and Calibration.from_dict(calibration)
        return model
