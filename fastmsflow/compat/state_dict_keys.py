"""Translates between the reference implementation's state-dict keys and this library's."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, cast, get_args

import torch
from einops import rearrange
from torch import Tensor, nn

from ..errors import InputError, first_few
from ..models.msflow import MultiScaleFlow
from ..reference.coupling import invert_permutation
from ..state_dicts import is_permutation, misfits, number_of_blocks

StateDict = dict[str, Tensor]
Variant = Literal["auto", "0.2", "master"]

# Parts of a key: ours -> theirs.
_PARALLEL = {"blocks.": "module_list.", "subnet.norm": "subnet.ln", ".perm": ".w_perm"}
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
    for mine, theirs in _PARALLEL.items():
        ours = ours.replace(mine, theirs)
    return ours


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
            result[theirs], result[f"{theirs}_inv"] = written_permutation(value, dense)
        elif key.endswith((".global_scale", ".global_offset")):
            result[theirs] = rearrange(value, "c -> 1 c 1 1").clone()
        else:
            result[theirs] = _plain(value)
    return result


def official_fusion(flow: MultiScaleFlow) -> StateDict:
    """Returns the official state dict of the fusion flow.

    Its permutations have the order of the official file from which the flow was read, or else that of the levels.
    """
    result: StateDict = {}
    for place, level in enumerate(_order(flow)):
        perm = flow.fusion_flow.get_buffer(f"perm{level}")
        result[f"module_list.{place}.perm"] = perm.clone()
        result[f"module_list.{place}.perm_inv"] = invert_permutation(perm)
    for key, value in flow.fusion_flow.state_dict().items():
        if not key.startswith("perm"):
            result[fusion_key(key, len(flow.channels))] = _plain(value)
    return result


def _order(flow: MultiScaleFlow) -> Sequence[int]:
    """Returns the levels in the order in which their permutations stand in an official file."""
    return range(len(flow.channels)) if flow.official_layout is None else flow.official_layout.order


def _plain(value: Tensor) -> Tensor:
    """Returns a contiguous copy, so that files do not depend on the flow's memory format."""
    return value.clone(memory_format=torch.contiguous_format)


def refuse_other_states(parallel: Sequence[StateDict], fusion: StateDict, flow: MultiScaleFlow) -> None:
    """Checks that state dicts have the keys and shapes of what ``official_parallel`` and ``official_fusion`` write.

    ``flow`` has the layout of these state dicts.
    Raises: InputError with the keys that do not fit.
    """
    faults = [
        f"parallel_flows[{level}]: {fault}"
        for level, official in enumerate(parallel)
        for fault in misfits(official_parallel(flow, level), official)
    ]
    _refuse(flow, [*faults, *(f"fusion_flow: {fault}" for fault in misfits(official_fusion(flow), fusion))])


def load_official_states(parallel: Sequence[StateDict], fusion: StateDict, flow: MultiScaleFlow) -> None:
    """Loads what ``official_parallel`` and ``official_fusion`` write, once ``refuse_other_states`` has checked it.

    Raises: InputError with the permutations that are none.
    """
    faults = [
        f"parallel_flows[{level}]: {fault}"
        for level, official in enumerate(parallel)
        for fault in _load(flow.parallel_flows[level], official, parallel_key)
    ]
    permutations = {f"perm{level}": f"module_list.{place}.perm" for place, level in enumerate(_order(flow))}
    faults += [
        f"fusion_flow: {fault}"
        for fault in _load(
            flow.fusion_flow, fusion, lambda key: permutations.get(key) or fusion_key(key, len(permutations))
        )
    ]
    _refuse(flow, faults)


def _refuse(flow: MultiScaleFlow, faults: list[str]) -> None:
    if faults:
        raise InputError(f"does not fit an MSFlow of channels {flow.channels}: {first_few(faults)}")


def _load(own: nn.Module, official: StateDict, official_key: Callable[[str], str]) -> list[str]:
    """Loads a state dict that has all keys, and returns the faults of its permutations."""
    state, faults = own.state_dict(), list[str]()
    for key, mine in state.items():
        theirs = official_key(key)
        value = official[theirs]
        if f"{theirs}_inv" in official:
            value = read_permutation(value, official[f"{theirs}_inv"], theirs, faults)
        state[key] = value.reshape(mine.shape)
    own.load_state_dict(state)
    return faults


def permutation_order(fusion: StateDict, channels: Sequence[int]) -> tuple[int, ...]:
    """Returns the levels in the order of their permutations in the official ``fusion``; they are matched by length.

    Raises: InputError if a level has no permutation.
    """
    keys = [f"module_list.{i}.perm" for i in range(len(channels))]
    lengths = [fusion[key].numel() for key in keys if key in fusion]
    order = matched(lengths, channels)
    if order is None:
        missing, left = Counter(channels) - Counter(lengths), Counter(lengths) - Counter(channels)
        raise InputError(
            f"missing fusion_flow: a permutation of {min(missing)} channels (of {len(channels)}; left over:"
            f" {list(left.elements())})"
        )
    return tuple(order)


def matched(wanted: Sequence[int], lengths: Sequence[int]) -> list[int] | None:
    """Returns for each of ``wanted`` the index of the first equal entry of ``lengths`` that is still free.

    The result is None if the two do not hold the same numbers.
    """
    if sorted(wanted) != sorted(lengths):
        return None
    free = list(range(len(lengths)))
    places = []
    for length in wanted:
        places.append(next(i for i in free if lengths[i] == length))
        free.remove(places[-1])
    return places


def inferred_shape(parallel: list[StateDict], path: object) -> tuple[list[int], list[int], list[int]]:
    """Returns (channels, condition channels, blocks) per level, inferred from the tensors' shapes.

    Raises: InputError if a level has no coupling block.
    """
    channels, conditions, blocks = [], [], []
    for level, state in enumerate(parallel):
        scales = [v for k, v in state.items() if k.endswith(".global_scale")]
        convs = [v for k, v in state.items() if k.endswith(".subnet.conv1.weight")]
        if not scales or not convs or convs[0].ndim != 4:
            found = first_few(sorted(state)) or "nothing"
            raise InputError(
                f"{path}: parallel_flows[{level}] is not an MSFlow flow: missing module_list.0.global_scale"
                f" or module_list.0.subnet.conv1.weight (found {found})"
            )
        channels.append(scales[0].numel())
        conditions.append(convs[0].shape[1] - (channels[-1] - channels[-1] // 2))
        blocks.append(number_of_blocks(state, "module_list."))
    return channels, conditions, blocks


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
        exact = is_permutation(index)
        exact = exact and torch.equal(invert_permutation(index), inverse.long())
    if not exact:
        faults.append(f"{where} and its inverse are not a hard permutation")
    return index
