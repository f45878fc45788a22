"""Reading and writing the reference implementation's checkpoints, strictly."""

import pickle
import zipfile
from pathlib import Path
from typing import Any, TypeGuard

import torch

from ..backend import Backend
from ..checkpoint import load_pickled, summary
from ..errors import InputError
from ..files import written_aside
from ..model import MultiScaleFlow
from ..reference.coupling import ClampForm
from . import keys
from .keys import Variant

_FORMS: dict[str, ClampForm] = {"0.2": "tanh", "master": "scaled_tanh"}


def load_official(
    path: str | Path,
    clamp: float = 1.9,
    variant: Variant = "auto",
    device: torch.device | str | None = None,
    backend: Backend = "auto",
) -> MultiScaleFlow:
    """The flow of an official checkpoint, in eval mode.

    Channels, condition channels and blocks are read off the tensors. ``clamp`` is not in the file: give what it was
    trained with. ``variant``: FrEIA's formula for the soft clamp, ``"0.2"`` clamp tanh(r) or ``"master"``
    clamp tanh(r / clamp); ``"auto"`` takes 0.2's for dense permutations and master's for index permutations (a file
    written by a FrEIA of 2023-06-20 to 08-17 has indices and needs ``"0.2"``; dense ones never had master's).
    ``device``: where the flow goes; the CPU if None.
    Errors: InputError naming the file, and each key that is missing, extra, misshapen or not a permutation; or where
    ``variant`` is a formula that no FrEIA computed with the file's permutations.
    """
    checkpoint = read_pickle(path)
    parallel, fusion = checkpoint.get("parallel_flows"), checkpoint.get("fusion_flow")
    if (
        not isinstance(parallel, list)
        or not parallel
        or not all(map(_is_state_dict, parallel))
        or not _is_state_dict(fusion)
    ):
        raise InputError(
            f"{path}: not an MSFlow checkpoint: it needs 'parallel_flows' (a list of state dicts) and 'fusion_flow'"
        )
    dense = any(v.ndim == 4 for state in parallel for k, v in state.items() if k.endswith(".w_perm"))
    if keys.check_variant(variant) == "auto":
        variant = "0.2" if dense else "master"
    keys.refuse_masters_formula(variant, dense, str(path))

    channels, conditions, blocks = keys.inferred_shape(parallel, path)
    try:
        flow = MultiScaleFlow(channels, conditions, blocks, clamp, backend, _FORMS[variant])
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    faults: list[str] = []
    state = {k: v for level, s in enumerate(parallel) for k, v in keys.own_parallel(s, flow, level, faults).items()}
    state |= keys.own_fusion(fusion, flow, faults)
    if faults:
        raise InputError(f"{path}: does not fit an MSFlow of channels {tuple(channels)}: {summary(faults)}")
    flow.load_state_dict(state)
    return flow.to(device).eval()


def save_official(
    flow: MultiScaleFlow, path: str | Path, epoch: int = 0, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Writes ``flow`` as the reference implementation's checkpoint, on the CPU, with the ``epoch`` it is from;
    ``optimizer``'s state goes in as it is.

    Permutations are written in the layout whose formula the flow uses: FrEIA 0.2's for ``tanh``, its git master's for
    ``scaled_tanh``. An earlier file stays until the new one is whole.
    """
    content: dict[str, Any] = {
        "epoch": epoch,
        "fusion_flow": _cpu(keys.official_fusion(flow)),
        "parallel_flows": [_cpu(keys.official_parallel(flow, level)) for level in range(len(flow.channels))],
    }
    if optimizer is not None:
        content["optimizer"] = optimizer.state_dict()
    with written_aside(path) as aside:
        torch.save(content, aside)


def read_pickle(path: str | Path) -> dict[str, Any]:
    """The content of an official checkpoint; nothing in it is run.

    Errors: InputError where the file is missing, damaged, or holds more than tensors and plain containers.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; give the path of an official MSFlow checkpoint (.pt)")
    try:
        content = load_pickled(path)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: refused: it is damaged or holds more than tensors, and could run code; get it from a source"
            " you trust and save it again with tensors only"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path}: cannot be read as a PyTorch checkpoint; it may be truncated: copy it again"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not an MSFlow checkpoint (a dict)")
    return content


def _is_state_dict(value: object) -> TypeGuard[keys.StateDict]:
    return isinstance(value, dict) and all(isinstance(v, torch.Tensor) for v in value.values())


def _cpu(state: keys.StateDict) -> keys.StateDict:
    return {key: value.cpu() for key, value in state.items()}
