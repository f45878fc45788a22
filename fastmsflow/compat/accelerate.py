"""Replaces the modules of a live FrEIA model by this library's, with the same parameters."""

import copy
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..backend import Backend, check, use
from ..errors import InputError
from .drop_in import (
    DropInBlock,
    DropInCoupling,
    DropInCrossConvolutions,
    DropInFusionFlow,
    DropInFusionSubnet,
    DropInParallelFlow,
    DropInPermutation,
    DropInSubnet,
)
from .state_dict_keys import Variant

# The largest difference of two computations of the same value, relative to the largest value, in float32 or better.
AGREEMENT = 1e-4
HOOKS = ("forward_pre", "forward", "backward_pre", "backward")
HALVES = (torch.float16, torch.bfloat16)
# Two callers at once would leave one's settings of cuDNN to the process.
_ONE_BY_ONE = threading.Lock()

Module = TypeVar("Module", bound=nn.Module)


def accelerate(
    parallel_flows: Iterable[nn.Module], fusion_flow: nn.Module, backend: Backend = "auto"
) -> tuple[list[DropInParallelFlow], DropInFusionFlow]:
    """Returns fast flows with the parameters of live flows, of FrEIA 0.2 or its git master.

    The parameters are shared, not copied: an optimizer that was built before keeps working, and training one model
    trains the other. A fused optimizer, such as ``Adam(fused=True)``, does not signal its changes: call ``eval()`` on
    the fast flows after steps through the live ones. Call and state dict stay as they are, see ``build_msflow_model``.
    Each block, and the fusion flow, is first run beside its replacement on a few pixels of noise, which also shows the
    formula of its soft clamp. Flows that are fast already are returned unchanged.

    Raises: InputError with the name of a module that is not MSFlow's, computes something else, or has hooks, which
    would not be called.
    """
    check(backend)
    parallel_flows = list(parallel_flows)
    ours = [flow for flow in parallel_flows if isinstance(flow, DropInParallelFlow)]
    if ours and len(ours) == len(parallel_flows) and isinstance(fusion_flow, DropInFusionFlow):
        return ours, fusion_flow
    for level, flow in enumerate(parallel_flows):
        _refuse_hooks(flow, f"parallel_flows[{level}]")
    _refuse_hooks(fusion_flow, "fusion_flow")
    fast = []
    for level, flow in enumerate(parallel_flows):
        blocks = [_block(b, f"parallel_flows[{level}].module_list[{k}]") for k, b in enumerate(_modules(flow, level))]
        fast.append(DropInParallelFlow(blocks, backend))
    if not fast:
        raise InputError("parallel_flows is empty; MSFlow has one per level")
    first = [cast(DropInBlock, flow.module_list[0]) for flow in fast]
    fusion = _fusion(fusion_flow, first[0].clamp, [block.global_scale.numel() for block in first], backend)
    for replacement, live in zip((*fast, fusion), (*parallel_flows, fusion_flow), strict=True):
        replacement.train(live.training)
    return fast, fusion


def _refuse_hooks(flow: nn.Module, where: str) -> None:
    for name, module in flow.named_modules():
        if any(getattr(module, f"_{kind}_hooks") for kind in HOOKS):
            raise InputError(
                f"{where}{name and '.'}{name} has hooks (weight_norm's, say), which the fast flow would not call;"
                " remove them before"
            )


def _modules(flow: nn.Module, level: int) -> nn.ModuleList:
    blocks = getattr(flow, "module_list", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise InputError(f"parallel_flows[{level}] is a {type(flow).__name__} without blocks, not MSFlow's SequenceINN")
    return blocks


def _block(block: nn.Module, where: str) -> DropInBlock:
    """Returns the replacement of ``block``. Raises: InputError if ``block`` has another architecture or function."""
    scale, offset, *perms = _attributes(block, ("global_scale", "global_offset", "w_perm", "w_perm_inv"), where)
    (theirs,) = _attributes(block, ("subnet",), where)
    subnet = DropInSubnet(*_attributes(theirs, ("conv1", "ln", "conv2"), f"{where}.subnet"))
    clamp = getattr(block, "clamp", None)
    if not isinstance(clamp, (int, float)):
        raise InputError(f"{where}.clamp is {clamp!r}, not the number that FrEIA's AllInOneBlock keeps there")
    dense = perms[0].ndim == 4
    variants: tuple[Variant, ...] = ("0.2",) if dense else ("master", "0.2")
    fast = [
        DropInBlock(scale, offset, *perms, subnet=subnet, clamp=float(clamp), variant=variant) for variant in variants
    ]
    error, best = min(((_block_error(block, each, where), each) for each in fast), key=lambda pair: pair[0])
    _refuse_difference(error, where)
    return best


def _fusion(fusion: nn.Module, clamp: float, channels: list[int], backend: Backend) -> DropInFusionFlow:
    where = "fusion_flow"
    modules = list(getattr(fusion, "module_list", ()))
    if len(modules) != len(channels) + 1:
        raise InputError(
            f"fusion_flow has {len(modules)} modules; MSFlow's has a permutation for each of the {len(channels)} levels"
            " and a coupling"
        )
    *permutations, coupling = modules
    subnets = [
        _fusion_subnet(subnet, f"{where}.subnet_{i}")
        for i, subnet in enumerate(_attributes(coupling, ("subnet_1", "subnet_2"), where), start=1)
    ]
    fast = DropInFusionFlow(
        [
            DropInPermutation(*_attributes(permutation, ("perm", "perm_inv"), f"{where}.module_list[{i}]"))
            for i, permutation in enumerate(permutations)
        ],
        DropInCoupling(subnets[0], subnets[1], clamp),
        backend,
    )
    theirs, ours = _precise(fusion, subnets[0].conv1.weight), _precise(fast, subnets[0].conv1.weight)
    x = [_noise(ours, c, 2 ** (len(channels) - i)) for i, c in enumerate(channels)]
    with _exactly(x[0]):
        error = _error(_call(theirs, where, x), ours(x))
    _refuse_difference(error, where)
    return fast


def _fusion_subnet(subnet: nn.Module, where: str) -> DropInFusionSubnet:
    mixing, *heads = _attributes(subnet, ("cross_convs", "conv_s", "conv_t"), where)
    layers = _attributes(mixing, ("conv1", "norm", "conv2"), f"{where}.cross_convs")
    return DropInFusionSubnet(DropInCrossConvolutions(*layers), *heads)


def _attributes(module: nn.Module, names: Sequence[str], where: str) -> list[Any]:
    missing = [name for name in names if getattr(module, name, None) is None]
    if missing:
        raise InputError(f"{where} is a {type(module).__name__} without {', '.join(missing)}: not a part of MSFlow")
    return [getattr(module, name) for name in names]


def _block_error(block: nn.Module, fast: DropInBlock, where: str) -> float:
    # The copy shares its parameters; FrEIA's git master takes no grid but the one in dims_in.
    theirs, ours = copy.copy(_precise(block, fast.global_scale)), _precise(fast, fast.global_scale)
    x = _noise(ours, fast.global_scale.numel(), 3)
    condition = _noise(ours, fast.subnet.conv1.in_channels - fast.half_channels, 3)
    vars(theirs)["dims_in"] = [tuple(x.shape[1:])]
    with _exactly(x):
        return _error(_call(theirs, where, [x], [condition]), ours(x, condition))


def _precise(module: Module, parameter: Tensor) -> Module:
    """Returns a float32 copy of a module in half precision, which rounds too much to tell formulas apart."""
    return copy.deepcopy(module).float() if parameter.dtype in HALVES else module


@contextmanager
def _exactly(x: Tensor) -> Iterator[None]:
    """Computes with plain PyTorch, without autocast and TF32, within the block."""
    kind = x.device.type
    cudnn = torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False)
    with _ONE_BY_ONE, torch.no_grad(), torch.autocast(kind, enabled=False), cudnn, use("torch"):
        yield


def _call(module: nn.Module, where: str, *inputs: object) -> Any:
    try:
        return module(*inputs)
    except Exception as error:
        raise InputError(f"{where}, a {type(module).__name__}, cannot be run as MSFlow's: {error}") from error


def _noise(module: nn.Module, channels: int, side: int) -> Tensor:
    """Returns noise in the dtype and on the device of ``module``."""
    generator = torch.Generator().manual_seed(0)
    like = next(p for p in module.parameters() if p.is_floating_point())
    return torch.randn(2, channels, side, side, generator=generator).to(like)


def _error(theirs: Any, ours: Any) -> float:
    """Returns the largest error of (z or a list of z, log_det), relative to the largest value."""
    pairs = zip(tree_leaves(theirs), tree_leaves(ours), strict=True)
    return max(((a - b).abs().max() / b.abs().max().clamp_min(1)).item() for a, b in pairs)


def _refuse_difference(error: float, where: str) -> None:
    """Raises: InputError if ``error`` is more than rounding."""
    if not error <= AGREEMENT:
        raise InputError(
            f"{where} computes something else than MSFlow's (relative difference {error:.1g}); only AllInOneBlock with"
            " SOFTPLUS and a hard permutation, and MSFlow's fusion, can be replaced"
        )
