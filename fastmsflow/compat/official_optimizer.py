"""Writes an optimizer's state as the reference implementation's own optimizer would have saved it."""

from typing import Any

from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from ..errors import InputError
from ..models.msflow import MultiScaleFlow
from .state_dict_keys import StateDict, fusion_key, parallel_key

# These settings choose an implementation, not a result; some releases of PyTorch refuse values that others accept.
_DEFAULT_IMPLEMENTATION = {"foreach": None, "fused": None, "capturable": False}


def official_optimizer(
    optimizer: Optimizer, flow: MultiScaleFlow, parallel: list[StateDict], fusion: StateDict, *, fusion_first: bool
) -> dict[str, Any]:
    """Makes the state dict of one Adam group over the parameters of all flows, the parallel ones first.

    ``fusion_first``: puts the fusion flow's parameters before those of the parallel flows.
    ``parallel``, ``fusion``: the flows' official state dicts, whose entries are the script's parameters. The
    permutations are among them; they are frozen and so have no state.

    Raises: InputError if ``optimizer`` is not Adam, its groups have different settings, or its parameters are not
    exactly those of ``flow``.
    """
    settings = _settings(optimizer, flow)
    states: list[dict[str, Any]] = []
    for level, official in enumerate(parallel):
        own = {parallel_key(name): p for name, p in flow.parallel_flows[level].named_parameters()}
        states += [_state(optimizer, own.get(key), value) for key, value in official.items()]
    own = {fusion_key(name, len(parallel)): p for name, p in flow.fusion_flow.named_parameters()}
    fusion_states = [_state(optimizer, own.get(key), value) for key, value in fusion.items()]
    states = fusion_states + states if fusion_first else states + fusion_states
    return {
        "state": {i: state for i, state in enumerate(states) if state},
        "param_groups": [{**settings, **_DEFAULT_IMPLEMENTATION, "params": list(range(len(states)))}],
    }


def _state(optimizer: Optimizer, parameter: nn.Parameter | None, like: Tensor) -> dict[str, Any]:
    """Copies the optimizer's state of ``parameter`` in the shape of ``like``; there is none before the first step."""
    state = {} if parameter is None else optimizer.state.get(parameter, {})
    return {
        # "step" is a tensor without dimensions.
        name: value.detach().cpu().contiguous().reshape(like.shape if value.ndim else ())
        for name, value in state.items()
    }


def _settings(optimizer: Optimizer, flow: MultiScaleFlow) -> dict[str, Any]:
    """Returns the settings that all groups share. Raises: InputError, see ``official_optimizer``."""
    decoupled = any(group.get("decoupled_weight_decay") for group in optimizer.param_groups)
    if not isinstance(optimizer, Adam) or isinstance(optimizer, AdamW) or decoupled:
        kind = "AdamW" if decoupled else type(optimizer).__name__
        raise InputError(
            f"the optimizer is {kind}, and the published script's is Adam;"
            " train with torch.optim.Adam, or leave the optimizer out"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    wanted = {id(p) for p in flow.parameters()}
    if held != wanted:
        others = f" and {len(held - wanted)} others" if held - wanted else ""
        raise InputError(
            f"the optimizer holds {len(held & wanted)} of the flow's {len(wanted)} parameters{others}, and the"
            " published script trains exactly these; train without frozen parts, or leave the optimizer out"
        )
    # Only Adam's own settings: schedulers and callers add others.
    first, *rest = [{key: _plain(group[key]) for key in optimizer.defaults} for group in optimizer.param_groups]
    differing = sorted({key for group in rest for key in first if group[key] != first[key]})
    if differing:
        raise InputError(
            f"the optimizer's groups differ in {', '.join(differing)}, and the published script has one group; give all"
            " parts the same (train without --part-lr), or leave the optimizer out"
        )
    return first


def _plain(setting: Any) -> Any:
    """Converts a setting that may be a list or a tensor to numbers."""
    if isinstance(setting, Tensor):
        return setting.item()
    return tuple(map(_plain, setting)) if isinstance(setting, (list, tuple)) else setting
