"""Reads and writes the reference implementation's checkpoints, strictly."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from ..backend import Backend
from ..errors import InputError, InputWarning
from ..files import checked_file, written_aside
from ..models.checkpoint import OfficialLayout
from ..models.msflow import MultiScaleFlow
from ..nn.feature_pooling import check_pool
from ..readable_file import check_file
from ..state_dicts import is_state_dict, load_pickled, refuse_views
from . import state_dict_keys
from .detect_clamp_formula import (
    CLAMP_FORMS,
    Formula,
    Images,
    compare_formulas,
    has_one_formula,
    pooled_batches,
    use_clamp_form,
    warn_of_either_formula,
)
from .official_optimizer import official_optimizer
from .state_dict_keys import Variant


def load_official(
    path: str | Path,
    clamp: float = 1.9,
    variant: Variant = "auto",
    device: torch.device | str | None = None,
    backend: Backend = "auto",
    *,
    images: Images | None = None,
    extractor: str = "wide_resnet50_2.tv_in1k",
    extractor_weights: str | Path | None = None,
    image_size: tuple[int, int] = (512, 512),
    pool: str = "avg",
) -> MultiScaleFlow:
    """Reads the flow of an official checkpoint, in eval mode.

    Channels, condition channels and blocks are inferred from the tensors. ``clamp`` is not in the file: give the value
    of the training. ``device``: the flow's device; None: the CPU.

    ``variant``: FrEIA's formula for the soft clamp, ``"0.2"`` clamp tanh(r) or ``"master"`` clamp tanh(r / clamp).
    Dense permutations only ever had the first. A file with index permutations does not say which it had. Nearly all of
    them had the first, since FrEIA's git master with the second fails on the published modules unless these are
    patched. So ``"auto"`` takes the first and warns (InputWarning, a UserWarning) that the file may mean the other one.

    ``images``: good images, preferably those that the flow was trained on, which tell the formulas of such a file
    apart: a file, a folder or several of them; a tensor (N, 3, H, W) in [0, 1]; or pooled features, one tensor (N, C_l,
    H_l, W_l) per level. The mean nll of at most 32 images is compared. With ``"auto"`` the formula of the lower mean is
    taken, or the first if the difference is below twice its standard error or neither formula fits the images; a
    warning names the formula and both means, and says if the result is doubtful because the flow has hardly been
    trained. A ``variant`` that is given stays, and a warning says if the other one fits better. ``extractor``,
    ``extractor_weights``, ``image_size`` (H, W) and ``pool`` describe the model that computes the features of images,
    as for ``fastmsflow.MSFlow``.

    Raises: InputError with the name of the file and of each key that is missing, extra, misshapen or not a permutation;
    also if ``variant`` is a formula that no FrEIA computed with the file's permutations, an image cannot be read, or
    features do not fit. UnavailableError if the extractor's weights cannot be downloaded.
    """
    flow = read_official(path, clamp, variant, backend).to(device)
    if has_one_formula(flow):
        return flow
    if images is not None:
        features = pooled_batches(
            images, flow, extractor=extractor, weights=extractor_weights, size=image_size, pool=check_pool(pool)
        )
        fit = compare_formulas(flow, features)
        formula, line = fit.settle(variant)
        use_clamp_form(flow, CLAMP_FORMS[formula])
        if variant == "auto" or fit.contradicts(variant):
            warnings.warn(f"{path}: {line}", InputWarning, stacklevel=2)
    elif variant == "auto":
        warn_of_either_formula(f"{path}:", str(path))
    return flow


def read_official(path: str | Path, clamp: float, variant: Variant, backend: Backend = "auto") -> MultiScaleFlow:
    """Reads the flow as ``load_official`` does, on the CPU; ``"auto"`` takes clamp tanh(r) without a warning."""
    checkpoint = read_pickle(path)
    parallel, fusion = checkpoint.get("parallel_flows"), checkpoint.get("fusion_flow")
    if not isinstance(parallel, list) or not parallel or not all(map(is_state_dict, parallel)):
        raise InputError(f"{path}: not an MSFlow checkpoint: its 'parallel_flows' are not a list of state dicts")
    if not is_state_dict(fusion):
        raise InputError(f"{path}: not an MSFlow checkpoint: its 'fusion_flow' is not a state dict")
    refuse_views(path, [tensor for state in (*parallel, fusion) for tensor in state.values()])
    dense = any(v.ndim == 4 for state in parallel for k, v in state.items() if k.endswith(".w_perm"))
    formula: Formula = "master" if state_dict_keys.check_variant(variant) == "master" else "0.2"
    state_dict_keys.refuse_masters_formula(formula, dense, str(path))

    channels, conditions, blocks = state_dict_keys.inferred_shape(parallel, path)
    try:
        layout = OfficialLayout(state_dict_keys.permutation_order(fusion, channels), dense)
        # The first one takes no memory, since the shapes may not be those of the tensors.
        for device in ("meta", "cpu"):
            with torch.device(device):
                flow = MultiScaleFlow(channels, conditions, blocks, clamp, backend, CLAMP_FORMS[formula])
            flow.official_layout = layout
            state_dict_keys.refuse_other_states(parallel, fusion, flow)
        state_dict_keys.load_official_states(parallel, fusion, flow)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return flow.eval()


def save_official(
    flow: MultiScaleFlow,
    path: str | Path,
    epoch: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
    fusion_first: bool = False,
) -> None:
    """Writes ``flow`` as a checkpoint of the reference implementation, with the number of its ``epoch``.

    ``optimizer``: torch's Adam over the flow's parameters, in any groups of equal settings. Its state is written for
    the published script's own Adam, which has one group, so that the script can resume from the file; without it the
    script can load the file to test or to start from. The script's group lists the parameters of the parallel flows,
    level by level, and then those of the fusion flow; ``fusion_first`` puts the fusion flow's before the others: the
    line of the script that builds its Adam shows which order applies. The file has no place for the states of the
    scheduler and the gradient scaler.

    All tensors are written on the CPU. A flow that was read from such a file is written with that file's order and
    layout of permutations, any other flow in the layout of its formula: FrEIA 0.2's for ``tanh``, its git master's for
    ``scaled_tanh``. An earlier file stays until the new one is complete.

    Raises: InputError if ``optimizer`` is not Adam, its groups have different settings, or its parameters are not
    exactly the flow's, for instance because some are frozen.
    """
    fusion = _cpu(state_dict_keys.official_fusion(flow))
    parallel = [_cpu(state_dict_keys.official_parallel(flow, level)) for level in range(len(flow.channels))]
    content: dict[str, Any] = {"epoch": epoch, "fusion_flow": fusion, "parallel_flows": parallel}
    if optimizer is not None:
        content["optimizer"] = official_optimizer(optimizer, flow, parallel, fusion, fusion_first=fusion_first)
    with written_aside(path) as aside, checked_file(aside) as file:
        torch.save(content, file)


def read_pickle(path: str | Path) -> dict[str, Any]:
    """Reads the content of an official checkpoint; no code in the file is run.

    Raises: InputError if the file is missing, damaged, or holds more than tensors and plain containers.
    """
    check_file(path, "give the path of an official MSFlow checkpoint (.pt)")
    try:
        content = load_pickled(path)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: refused: it is damaged or holds more than tensors, and could run code; get it from a source"
            " you trust and save it again with tensors only"
        ) from error
    # A damaged file can raise nearly anything. PyTorch's message is left out: it advises to trust the file.
    except Exception as error:
        raise InputError(
            f"{path}: cannot be read as a PyTorch checkpoint; it may be truncated: copy it again"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not an MSFlow checkpoint (a dict)")
    return content


def _cpu(state: state_dict_keys.StateDict) -> state_dict_keys.StateDict:
    return {key: value.cpu() for key, value in state.items()}
