"""Translates between the reference implementation's state-dict keys and this library's."""

import re
from typing import Literal, cast, get_args

import torch
from einops import rearrange
from torch import Tensor

from ..errors import InputError, first_few
from ..models.msflow import MultiScaleFlow
from ..reference.coupling import invert_permutation

StateDict = dict[str, Tensor]
Variant = Literal["auto", "0.2", "master"]

# Parts of a key: ours -> theirs.
_SUBNET = {"subnet.norm": "subnet.ln"}
_FUSION = {".conv1": ".cross_convs.conv1", ".norm": ".cross_convs.norm", ".conv2": ".cross_convs.conv2"}


def check_variant(name: str) -> Variant:
    """Returns ``name``. Raises: InputError if ``name`` is neither a formula of the soft clamp nor "auto"."""
    if name not in get_args(Variant):
        raise InputError(f"variant {name!r} is not known; choose 'auto', '0.2' or 'master'")
    return cast(Variant, name)


def refuse_masters_formula(variant: Variant, dense: bool, where: str) -> None:
    """Raises: InputError if dense permutations meet master's formula: no version of FrEIA had both."""
    if dense and variant == "master":
        raise InputError(
            f"{where}: dense permutations are FrEIA 0.2's, whose formula is clamp tanh(r); variant 'master' would"
            " compute something else: use 'auto'"
        )


def parallel_key(ours: str) -> str:
    """Returns the official key, e.g. ``module_list.0.subnet.ln.weight`` for ``blocks.0.subnet.norm.weight``."""
    key = ours.replace("blocks.", "module_list.", 1)
    for mine, theirs in _SUBNET.items():
        key = key.replace(mine, theirs)
    return key


def fusion_key(ours: str, levels: int) -> str:
    """Returns the official key, e.g. ``module_list.3.subnet_1.cross_convs.conv1.weight`` for ``subnet_1.conv1.weight``
    and 3 levels."""
    for mine, theirs in _FUSION.items():
        ours = ours.replace(mine, theirs)
    return f"module_list.{levels}.{ours}"


def official_parallel(flow: MultiScaleFlow, level: int) -> StateDict:
    """Returns the state dict of one parallel flow as FrEIA writes it.

    Permutations have the layout of the official file from which the flow was read; for any other flow, 0.2's (dense)
    for the ``tanh`` form and its git master's (indices) for ``scaled_tanh``.
    """
    dense = flow.clamp_form == "tanh" if flow.official_layout is None else flow.official_layout.dense
    result: StateDict = {}
    for key, value in flow.parallel_flows[level].state_dict().items():
        theirs = parallel_key(key)
        if key.endswith(".perm"):
            perm, inverse = written_permutation(value, dense)
            result[theirs.replace(".perm", ".w_perm")] = perm
            result[theirs.replace(".perm", ".w_perm_inv")] = inverse
        elif key.endswith((".global_scale", ".global_offset")):
            result[theirs] = rearrange(value, "c -> 1 c 1 1").clone()
        else:
            result[theirs] = _plain(value)
    return result


def official_fusion(flow: MultiScaleFlow) -> StateDict:
    """Returns the official state dict of the fusion flow.

    Its permutations have the order of the official file from which the flow was read, or else that of the levels.
    """
    order = range(len(flow.channels)) if flow.official_layout is None else flow.official_layout.order
    result: StateDict = {}
    for place, level in enumerate(order):
        perm = flow.fusion_flow.get_buffer(f"perm{level}")
        result[f"module_list.{place}.perm"] = perm.clone()
        result[f"module_list.{place}.perm_inv"] = invert_permutation(perm)
    for key, value in flow.fusion_flow.state_dict().items():
        if not key.startswith("perm"):
            result[fusion_key(key, len(flow.channels))] = _plain(value)
    return result


def _plain(value: Tensor) -> Tensor:
    """Returns a contiguous copy, so that files do not depend on the flow's memory format."""
    return value.clone(memory_format=torch.contiguous_format)


def own_parallel(official: StateDict, flow: MultiScaleFlow, level: int, faults: list[str]) -> StateDict:
    """Inverts ``official_parallel``; entries that do not fit are named in ``faults``."""
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


def own_fusion(official: StateDict, flow: MultiScaleFlow, faults: list[str]) -> tuple[StateDict, tuple[int, ...]]:
    """Inverts ``official_fusion``, and returns the order of the permutations too, which are matched by their length."""
    where = "fusion_flow: "
    levels = len(flow.channels)
    result: StateDict = {}
    used: set[str] = set()
    free = [f"module_list.{i}.perm" for i in range(levels)]
    levels_at = dict.fromkeys(free, -1)
    for level, channels in enumerate(flow.channels):
        match = next((key for key in free if key in official and official[key].numel() == channels), None)
        if match is None:
            there = [official[key].numel() for key in free if key in official]
            faults.append(f"missing {where}a permutation of {channels} channels (of {levels}; left over: {there})")
            continue
        free.remove(match)
        levels_at[match] = level
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
    return {f"fusion_flow.{key}": value for key, value in result.items()}, tuple(levels_at.values())


def inferred_shape(parallel: list[StateDict], path: object) -> tuple[list[int], list[int], list[int]]:
    """Returns (channels, condition channels, blocks) per level, inferred from the tensors' shapes.

    Raises: InputError if a level has no coupling block.
    """
    channels, conditions, blocks = [], [], []
    for level, state in enumerate(parallel):
        scales = [v for k, v in state.items() if k.endswith(".global_scale")]
        convs = [v for k, v in state.items() if k.endswith(".subnet.conv1.weight")]
        indices = [int(m[1]) for k in state if (m := re.match(r"module_list\.(\d+)\.", k))]
        if not scales or not convs or convs[0].ndim != 4:
            found = first_few(sorted(state)) or "nothing"
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
    matrix = torch.zeros(len(perm), len(perm), device=perm.device)
    matrix[torch.arange(len(perm)), perm] = 1.0
    # The inverse lies transposed in memory, as in FrEIA 0.2's files.
    return rearrange(matrix, "i j -> i j 1 1"), rearrange(matrix.T.clone(), "i j -> i j 1 1")


def read_permutation(perm: Tensor, inverse: Tensor, where: str, faults: list[str]) -> Tensor:
    """Returns the index form of either layout; anything but a permutation and its inverse is added to ``faults``."""
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
