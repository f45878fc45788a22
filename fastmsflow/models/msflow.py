"""The model: extractor, pool and flow."""

import copy
import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit._trace import is_tracing

from .. import backend as backends
from ..backend import Backend
from ..calibration import Calibration
from ..cpu.features import missing_units
from ..errors import InputError, InputWarning
from ..inductor import check_cpp_compiler
from ..nn.compiled_functions import CompiledFunctions
from ..nn.cuda_graph import CudaGraphCache, Outputs, WeightAddresses
from ..nn.feature_extractor import FeatureExtractor
from ..nn.feature_pooling import FeatureNormalizer, Pool, check_pool, pool_features
from ..nn.no_initialization import NoInitialization
from ..nn.trained_model import trained_model
from ..nn.weight_cache import WeightCache, invalidation_count
from ..number_range import check_image_size
from ..reference.clamp_forms import ClampForm
from ..scoring import TOP_K, Prediction, Scores, score_log_likelihoods
from ..tiling import Tiling
from .checkpoint import (
    AGAIN,
    OfficialLayout,
    built_from,
    read_header,
    read_tensors,
    refuse_other_tensors,
    write_checkpoint,
)
from .fused_extractor import extractor_dtype, fuse_extractor
from .hub import HubModel
from .image_checks import check_images, check_values
from .multi_scale_flow import MultiScaleFlow

__all__ = ["MSFlow", "MultiScaleFlow", "Prediction"]


class MSFlow(nn.Module, HubModel, library_name="fastmsflow", paper_url="https://arxiv.org/abs/2308.15300"):
    """Computes likelihood, scores and maps of images by a frozen extractor, a pool and a flow.

    ``extractor``: any timm backbone that serves features; ``pretrained``, ``extractor_weights``, ``layers``,
    ``level_strides``: see fastmsflow.nn.feature_extractor.FeatureExtractor. ``image_size``: (H, W). ``pool``:
    ``"avg"``, ``"max"`` or ``"none"``.
    ``standardise``: whether the pooled features are normalized per channel (off in the published recipe; fit the
    statistics with ``standardiser.fit``). The other arguments: see MultiScaleFlow.

    Raises: InputError if an argument is not one of these or weights do not fit; UnavailableError if pretrained weights
    cannot be had.
    """

    pool: Pool
    calibration: Calibration | None
    """The scores of good images that were held out of training, if there are any; saved with the model."""
    tiling: Tiling | None
    """The way in which images of any size are cut into tiles, see fastmsflow.inference.TiledPredictor; saved with the
    model. None: images are resized to ``image_size``. ``predict`` takes a tile for an image."""
    made_for_inference: bool
    """True if ``for_inference`` returned this model."""
    _has_seen_values = False

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
        layers: Sequence[int] | None = None,
        level_strides: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.image_size = check_image_size(image_size)
        self.pool = check_pool(pool)
        self.extractor = FeatureExtractor(
            extractor, pretrained, extractor_weights, self.image_size, layers=layers, level_strides=level_strides
        )
        channels = self.extractor.channels
        self.standardiser = FeatureNormalizer(channels) if standardise else None
        self.flow = MultiScaleFlow(channels, condition_channels, blocks, clamp, backend, clamp_form)
        self.calibration, self.tiling = None, None
        self._graphs, self._weight_addresses = CudaGraphCache(), WeightAddresses()
        self._fused_extractor: WeightCache[nn.Module] = WeightCache()
        self._compiled = CompiledFunctions()
        self.made_for_inference = False

    @property
    def config(self) -> dict[str, Any]:
        """The values, fit for JSON, from which ``load`` builds this model again."""
        return {
            "extractor": self.extractor.name,
            "image_size": list(self.image_size),
            "pool": self.pool,
            "standardise": self.standardiser is not None,
            "flow": self.flow.config,
            "official_layout": self.flow.official_layout and self.flow.official_layout._asdict(),
            "calibration": self.calibration and self.calibration.as_dict(),
            **({"tiling": self.tiling.config} if self.tiling else {}),
            **self.extractor.level_config,
        }

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.flow.parameters()).device

    def pooled(self, images: Tensor, *, fused: bool = False) -> list[Tensor]:
        """Computes pooled features (B, C_l, H_l, W_l) per level, not normalized, of images (B, 3, H, W) in [0, 1].

        ``fused``: on a CPU a copy of the extractor computes them, of the kind that ``for_inference`` makes; it is made
        once for given weights. The features are the same up to rounding.
        Raises: InputError if images are not floating, not of this shape or not of ``image_size``.
        """
        if tuple(images.shape[-2:]) != self.image_size:
            raise InputError(f"images are {tuple(images.shape[-2:])}; this model takes {self.image_size}: resize them")
        backend = self.flow.backend
        # An extractor of the caller's own takes images alone.
        extractor = self._extractor_fused() if fused else self.extractor
        features = extractor(images) if backend == "auto" else extractor(images, backend)
        return pool_features(features, self.pool)

    def _extractor_fused(self) -> nn.Module:
        """Returns the extractor whose convolutions are fused, or the extractor itself where that is not done."""
        extractor = self.extractor
        if not isinstance(extractor, FeatureExtractor) or self.made_for_inference or extractor.mean.is_cuda:
            return extractor
        # Norms are folded in float32 only.
        if extractor.dtype != torch.float32:
            return extractor
        # The cache keeps nothing where gradients are taken; of a frozen extractor none are.
        with torch.no_grad():
            return self._fused_extractor.get(
                lambda: fuse_extractor(copy.deepcopy(extractor), self.image_size).to(memory_format=torch.channels_last),
                [*extractor.parameters(), *extractor.buffers()],
            )

    def features(self, images: Tensor, *, fused: bool = False) -> list[Tensor]:
        """Computes the flow's input, (B, C_l, H_l, W_l) per level without gradient, of images (B, 3, H, W) in [0, 1].

        ``fused``: see ``pooled``. A CUDA graph is replayed as ``predict`` does.
        Raises: InputError if images do not fit: see ``predict``.
        """
        self._check(images)
        return list(self._replayed(self._features, [images], fused))

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Computes z per level and log_det (B,) of images (B, 3, H, W) in [0, 1].

        Raises: InputError if images do not fit: see ``predict``.
        """
        return self.flow(self.features(images))

    def nll(self, images: Tensor) -> Tensor:
        """Computes the negative log-likelihood (B,) of images (B, 3, H, W) in [0, 1]: see MultiScaleFlow.nll.

        Raises: InputError if images do not fit: see ``predict``.
        """
        return self.flow.nll(self.features(images))

    def scores(self, images: Tensor, top_k: float = TOP_K) -> Scores:
        """Computes scores and maps of images (B, 3, H, W) in [0, 1].

        ``top_k``: share of the pixels that an image's scores average. A CUDA graph is replayed as ``predict`` does.
        Raises: InputError if images do not fit, see ``predict``, or ``top_k`` is not in [0, 1].
        """
        self._check(images)
        return Scores(*self._replayed(self._scores, [images], top_k))

    def scores_of_features(self, features: Sequence[Tensor], top_k: float = TOP_K) -> Scores:
        """Computes ``scores`` from the result of ``features``, (B, C_l, H_l, W_l) per level.

        Raises: InputError if shapes or dtypes do not fit, or ``top_k`` is not in [0, 1].
        """
        return Scores(*self._replayed(self._scores_of_features, features, top_k))

    @torch.no_grad()
    def predict(self, images: Tensor, top_k: float = TOP_K) -> Prediction:
        """Computes scores and maps at ``image_size`` of images (B, 3, H, W) in [0, 1].

        On a GPU, in eval mode and without gradients, the second batch of a shape is recorded in a CUDA graph, which it
        and all later ones replay: keep shapes the same, and call from one thread at a time. The results are not written
        to again. ``top_k``: share of the pixels that an image's scores average.

        An image with NaN has scores of NaN, leaves the others as they are, and is told by an InputWarning. Values are
        looked at in each batch on a CPU, and on a GPU, which would have to be waited for, in the model's first.
        Raises: InputError if images are not a floating tensor of this shape, of ``image_size`` and on the model's
        device, are none, are far out of [0, 1] or all NaN, or if ``top_k`` is not in [0, 1].
        """
        self._check(images)
        return Prediction(*self._replayed(self._predict, [images], top_k))

    def _check(self, images: Tensor) -> None:
        """Raises InputError if images are not what this model takes; see ``predict``."""
        if torch.compiler.is_compiling() or is_tracing():
            return
        device = self.device
        check_images(images, self.image_size, device)
        # A GPU would have to be waited for at each batch. An unfit range is that of all batches, so one tells.
        is_captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if device.type == "cpu" or not (self._has_seen_values or is_captured):
            check_values(images, may_be_nan=self.training)
            self._has_seen_values = True

    def _replayed(self, function: Callable[..., Outputs], inputs: Sequence[Tensor], *options: float) -> Outputs:
        """Returns ``function(*options, *inputs)``, computed by a CUDA graph if one serves."""
        call = partial(function, *options)
        if self.training or torch.compiler.is_compiling():
            return call(*inputs)

        def state() -> Hashable:
            # Graphs read weights where they lie, values cached from them as they were, and run the backend's kernels.
            weights = (self._weight_addresses.version_of(self), invalidation_count())
            return function.__name__, options, *weights, backends.override(), self.flow.backend

        return self._graphs(call, inputs, state)

    def _features(self, fused: bool, images: Tensor) -> Outputs:
        if fused:
            return self._compute_features(images, fused=True)
        return self._compiled(self._compute_features, [images], self)

    def _compute_features(self, images: Tensor, fused: bool = False) -> Outputs:
        pooled = self.pooled(images, fused=fused)
        if self.standardiser is not None:
            pooled = self.standardiser(pooled)
        # for_inference gives extractor and flow dtypes of their own.
        return tuple(level.to(self.flow.dtype) for level in pooled)

    def _scores_of_features(self, top_k: float, *features: Tensor) -> Scores:
        logp = self._log_likelihoods(*features)
        return score_log_likelihoods(logp, self.image_size, top_k, self.flow.backend)

    def log_likelihoods(self, features: Sequence[Tensor], offsets: Tensor | None = None) -> list[Tensor]:
        """Computes -0.5 mean over channels of z^2, (B, H_l, W_l) per level, from the result of ``features``.

        ``offsets``: see ``MultiScaleFlow.forward``. Raises: InputError if shapes or dtypes do not fit.
        """
        if offsets is None:
            return list(self._replayed(self._log_likelihoods, features))
        return list(self._replayed(self._log_likelihoods_at, [offsets, *features]))

    def _log_likelihoods(self, *features: Tensor) -> Outputs:
        return self._compiled(self._compute_log_likelihoods, features, self.flow)

    def _log_likelihoods_at(self, offsets: Tensor, *features: Tensor) -> Outputs:
        return tuple(self.flow.log_likelihoods(features, offsets))

    def _compute_log_likelihoods(self, *features: Tensor) -> Outputs:
        return tuple(self.flow.log_likelihoods(features))

    def _scores(self, top_k: float, images: Tensor) -> Scores:
        return self._scores_of_features(top_k, *self._features(False, images))

    def _predict(self, top_k: float, images: Tensor) -> Outputs:
        s = self._scores(top_k, images)
        return s.score, s.log_score, s.score_map_add, s.score_map_mul, s.absolute_score

    def for_inference(self, dtype: torch.dtype = torch.float32, *, compile: bool = False) -> "MSFlow":
        """Returns a copy that predicts faster and no longer trains.

        Batch norms are folded into convolutions, these are fused with their ReLUs and residuals, and weights are in
        ``dtype`` and in channels-last memory, without gradients. Sums are in float32 in every dtype.

        On a GPU float16 keeps scores nearest (measured in benchmarks/NOTES.md); a value beyond its range, 65504,
        becomes inf and the score inf or NaN, unless cuDNN's ReLU takes a NaN for 0. With bfloat16 the extractor still
        is in float16: else its features move by a tenth.

        On a CPU bfloat16 is for chips with AMX-BF16 or AVX512-BF16, and float16 for those with AMX-FP16; an
        InputWarning says if this one is none of them, and slower in ``dtype`` than in float32. The extractor stays in
        float32, but with float16 and AMX-FP16.

        ``compile``: on a CPU, ``features``, ``scores`` and ``predict`` compute by programs of torch.compile, which
        needs a C++ compiler. For WideResNet-50-2 they are 1.1 to 1.2 times as fast as eager mode (docs/usage.md), and
        their first calls compile for up to half a minute; the logger ``fastmsflow`` tells how long. A second batch size
        compiles once more: that program serves all sizes but 1, which has its own. Most weights are in memory once
        more, as constants. Where gradients are taken of an input, eager mode computes.

        Raises: InputError if ``compile`` is asked for on a GPU; UnavailableError if there is no C++ compiler.
        """
        device = self.device
        if compile and device.type != "cpu":
            raise InputError("compile=True is for CPUs; on a GPU leave it out, since kernels and CUDA graphs compute")
        if compile:
            check_cpp_compiler()
        lack = missing_units(dtype) if device.type == "cpu" else None
        if lack is not None:
            warnings.warn(f"{lack}; take torch.float32", InputWarning, stacklevel=2)
        result = copy.deepcopy(self).eval().requires_grad_(False)
        fuse_extractor(result.extractor, self.image_size)
        result.made_for_inference = True
        result.flow.to(dtype=dtype)
        result.extractor.to(dtype=extractor_dtype(dtype, device))
        result.to(memory_format=torch.channels_last)
        if result.standardiser is not None:
            result.standardiser = copy.deepcopy(self.standardiser)
        result._compiled = CompiledFunctions(compile)
        return result

    def train(self, mode: bool = True) -> "MSFlow":
        """Sets the mode, as any module's; the extractor stays in eval mode, and recorded graphs are dropped."""
        self._drop_recorded()
        return super().train(mode)

    def _apply(self, *args: Any, **options: Any) -> "MSFlow":
        """Moves to a device or dtype, and drops recorded graphs."""
        self._drop_recorded()
        return super()._apply(*args, **options)

    def _drop_recorded(self) -> None:
        self._graphs.clear()
        self._compiled.clear()

    def save(self, path: str | Path, **notes: Any) -> None:
        """Writes everything needed to predict, extractor included, as one safetensors file.

        ``notes`` go into its configuration under ``"notes"``.
        Raises: InputError if ``for_inference`` returned this model.
        """
        if self.made_for_inference:
            raise InputError("for_inference has merged weights of this copy; save the model that it was made from")
        write_checkpoint(path, self.state_dict(), {**self.config, "notes": notes})

    @classmethod
    def load(cls, path: str | Path, backend: Backend = "auto") -> "MSFlow":
        """Reads a file that ``save`` or ``fastmsflow convert`` wrote; the model is in eval mode on the CPU.

        A converted official file holds flow weights only, unless it was given its extractor's: timm's are taken then.
        Raises: InputError, naming the keys, if weights do not fit; UnavailableError if they cannot be downloaded.
        """
        held, config = read_header(path)
        has_extractor = any(key.startswith("extractor.") for key in held)
        without = "\0" if has_extractor else "extractor."
        # Every tensor of a whole model is read below.
        with built_from(path), trained_model(), NoInitialization() if has_extractor else nullcontext():
            build = partial(cls.from_config, config, backend=backend)
            what = "the model its configuration describes"
            refuse_other_tensors(what, path, partial(build, pretrained=False), held, without=without)
            model = build(pretrained=not has_extractor)
            given, own = config["flow"]["channels"], list(model.flow.channels)
            if given != own:
                raise InputError(f"its configuration is damaged (flow.channels is {given}, not {own}); {AGAIN}")
        tensors = read_tensors(path)
        if not has_extractor:
            tensors |= {key: value for key, value in model.state_dict().items() if key.startswith("extractor.")}
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
        """Makes a new model of the shape that ``config`` (see the property) describes.

        Raises: InputError and UnavailableError as the constructor does.
        """
        flow = config["flow"]
        model = cls(
            config["extractor"],
            pretrained,
            image_size=tuple(config["image_size"]),
            pool=config["pool"],
            condition_channels=flow["condition_channels"],
            blocks=flow["blocks"],
            clamp=flow["clamp"],
            backend=backend,
            clamp_form=flow["clamp_form"],
            extractor_weights=extractor_weights,
            standardise=config["standardise"],
            layers=config.get("layers"),
            level_strides=config.get("level_strides"),
        )
        model.flow.official_layout = OfficialLayout.from_config(config)
        model.tiling = Tiling.from_config(config.get("tiling"))
        calibration = config.get("calibration")
        model.calibration = calibration and Calibration.from_dict(calibration)
        return model
