"""The reference implementation's state-dict keys, and ours."""

import re
from typing import Literal, cast, get_args

import torch
from einops import rearrange
from torch import Tensor

from ..checkpoint import summary
from ..errors import InputError
from ..model import MultiScaleFlow
from ..reference.coupling import invert_permutation

StateDict = dict[str, Tensor]
Variant = Literal["auto", "0.2", "master"]

# Ours -> theirs, as pieces of a key.
_SUBNET = {"subnet.norm": "subnet.ln"}
_FUSION = {".conv1": ".cross_convs.conv1", ".norm": ".cross_convs.norm", ".conv2": ".cross_convs.conv2"}


def check_variant(name: str) -> Variant:
    """``name`` if it is a formula of the soft clamp, or "auto". Errors: InputError otherwise."""
    if name not in get_args(Variant):
        raise InputError(f"variant {name!r} is not known; choose 'auto', '0.2' or 'master'")
    return cast(Variant, name)


def refuse_masters_formula(variant: Variant, dense: bool, where: str) -> None:
    """Errors: InputError where dense permutations meet master's formula: no FrEIA had both."""
    if dense and variant == "master":
        raise InputError(
            f"{where}: dense permutations are FrEIA 0.2's, whose formula is clamp tanh(r); variant 'master' would"
            " compute something else: use 'auto'"
        )


def parallel_key(ours: str) -> str:
    """``blocks.0.subnet.norm.weight`` -> ``module_list.0.subnet.ln.weight``."""
    key = ours.replace("blocks.", "module_list.", 1)
    for mine, theirs in _SUBNET.items():
        key = key.replace(mine, theirs)
    return key


def fusion_key(ours: str, levels: int) -> str:
    """``subnet_1.conv1.weight`` -> ``module_list.3.subnet_1.cross_convs.conv1.weight`` where there are 3 levels."""
    for mine, theirs in _FUSION.items():
        ours = ours.replace(mine, theirs)
    return f"module_list.{levels}.{ours}"


def official_parallel(flow: MultiScaleFlow, level: int) -> StateDict:
    """State dict of one parallel flow as FrEIA writes it: 0.2's dense permutations for the ``tanh`` form, its git
    master's indices for ``scaled_tanh``."""
    result: StateDict = {}
    for key, value in flow.parallel_flows[level].state_dict().items():
        theirs = parallel_key(key)
        if key.endswith(".perm"):
            perm, inverse = written_permutation(value, dense=flow.clamp_form == "tanh")
            result[theirs.replace(".perm", ".w_perm")] = perm
            result[theirs.replace(".perm", ".w_perm_inv")] = inverse
        elif key.endswith((".global_scale", ".global_offset")):
            result[theirs] = rearrange(value, "c -> 1 c 1 1").clone()
        else:
            result[theirs] = value.clone()
    return result


def official_fusion(flow: MultiScaleFlow) -> StateDict:
    """State dict of the fusion flow; its permutations stand in the order of the levels."""
    result: StateDict = {}
    for level in range(len(flow.channels)):
        perm = flow.fusion_flow.get_buffer(f"perm{level}")
        result[f"module_list.{level}.perm"] = perm.clone()
        result[f"module_list.{level}.perm_inv"] = invert_permutation(perm)
    for key, value in flow.fusion_flow.state_dict().items():
        if not key.startswith("perm"):
            result[fusion_key(key, len(flow.channels))] = value.clone()
    return result


def own_parallel(official: StateDict, flow: MultiScaleFlow, level: int, faults: list[str]) -> StateDict:
    """The inverse of ``official_parallel``; what does not fit is named in ``faults``."""
    where = f"parallel_flows[{level}]: "
    dense = next((v.ndim == 4 for k, v in official.items() if k.endswith(".w_perm")), True)
    expected = flow.parallel_flows[level].state_dict()
    result: StateDict = {}
    used: set[str] = set()
    for key, mine in expected.items():
        theirs = parallel_key(key)
        if key.endswith(".perm"):
            keys = (theirs.replace(".perm", ".w_perm"), theirs.replace(".perm", ".w_perm_inv"))
            shape = (len(mine), len(mine), 1, 1) if dense else (len(mine),)
            pair = [_take(official, k, shape, where, faults) for k in keys]
            used.update(keys)
            if pair[0] is not None and pair[1] is not None:
                result[key] = read_permutation(pair[0], pair[1], where + keys[0], faults)
        else:
            flat = key.endswith((".global_scale", ".global_offset"))
            value = _take(official, theirs, (1, len(mine), 1, 1) if flat else tuple(mine.shape), where, faults)
            used.add(theirs)
            if value is not None:
                result[key] = value.reshape(mine.shape)
    faults += [f"unexpected {where}{key}" for key in official if key not in used]
    return {f"parallel_flows.{level}.{key}": value for key, value in result.items()}


def own_fusion(official: StateDict, flow: MultiScaleFlow, faults: list[str]) -> StateDict:
    """The inverse of ``official_fusion``. The permutations stand in any order and are matched by their length."""
    where = "fusion_flow: "
    levels = len(flow.channels)
    result: StateDict = {}
    used: set[str] = set()
    free = [f"module_list.{i}.perm" for i in range(levels)]
    for level, channels in enumerate(flow.channels):
        match = next((key for key in free if key in official and official[key].numel() == channels), None)
        if match is None:
            there = [official[key].numel() for key in free if key in official]
            faults.append(f"missing {where}a permutation of {channels} channels (of {levels}; left over: {there})")
            continue
        free.remove(match)
        inverse = _take(official, f"{match}_inv", (channels,), where, faults)
        used.update((match, f"{match}_inv"))
        if inverse is not None:
            result[f"perm{level}"] = read_permutation(official[match], inverse, where + match, faults)
    for key, mine in flow.fusion_flow.state_dict().items():
        if not key.startswith("perm"):
            theirs = fusion_key(key, levels)
            value = _take(official, theirs, tuple(mine.shape), where, faults)
            used.add(theirs)
            if value is not None:
                result[key] = value
    faults += [f"unexpected {where}{key}" for key in official if key not in used]
    return {f"fusion_flow.{key}": value for key, value in result.items()}


def inferred_shape(parallel: list[StateDict], path: object) -> tuple[list[int], list[int], list[int]]:
    """(channels, condition channels, blocks) per level, read off the tensors' shapes.

    Errors: InputError where a level has no coupling block to read them off.
    """
    channels, conditions, blocks = [], [], []
    for level, state in enumerate(parallel):
        scales = [v for k, v in state.items() if k.endswith(".global_scale")]
        convs = [v for k, v in state.items() if k.endswith(".subnet.conv1.weight")]
        indices = [int(m[1]) for k in state if (m := re.match(r"module_list\.(\d+)\.", k))]
        if not scales or not convs or convs[0].ndim != 4:
            found = summary(sorted(state)) or "nothing"
            raise InputError(
                f"{path}: parallel_flows[{level}] is not an MSFlow flow: missing module_list.0.global_scale"
                f" or module_list.0.subnet.conv1.weight (found {found})"
            )
        channels.append(scales[0].numel())
        conditions.append(convs[0].shape[1] - (channels[-1] - channels[-1] // 2))
        blocks.append(max(indices) + 1)
    return channels, conditions, blocks


def _take(official: StateDict, key: str, shape: tuple[int, ...], where: str, faults: list[str]) -> Tensor | None:
    if key not in official:
        faults.append(f"missing {where}{key}")
        return None
    value = official[key]
    if tuple(value.shape) != shape:
        faults.append(f"{where}{key} is {tuple(value.shape)}, not {shape}")
        return None
    return value


def written_permutation(perm: Tensor, dense: bool) -> tuple[Tensor, Tensor]:
    if not dense:
        return perm.clone(), invert_permutation(perm)
    matrix = torch.zeros(len(perm), len(perm), 1, 1, device=perm.device)
    matrix[torch.arange(len(perm)), perm] = 1.0
    return matrix, rearrange(matrix, "i j 1 1 -> j i 1 1").contiguous()


def read_permutation(perm: Tensor, inverse: Tensor, where: str, faults: list[str]) -> Tensor:
    """Index form of either layout; anything but a permutation and its inverse is a fault."""
    if perm.ndim == 4:
        index = perm[:, :, 0, 0].argmax(dim=1)
        exact = torch.equal(perm, written_permutation(index, dense=True)[0].to(perm.dtype))
        exact = exact and torch.equal(inverse, perm.transpose(0, 1))
    else:
        index = perm.long()
        exact = torch.equal(index.sort().values, torch.arange(len(index), device=index.device))
        exact = exact and torch.equal(invert_permutation(index), inverse.long())
    if not exact:
        faults.append(f"{where} and its inverse are not a hard permutation")
    return index
