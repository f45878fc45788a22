"""Builds new flows with the reference implementation's call and state dict."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from ..backend import Backend, check
from ..errors import InputError
from ..nn.subnets import ConditionedSubnet, FusionSubnet
from ..reference.coupling import initial_global_scale, invert_permutation
from .detect_clamp_formula import warn_of_either_formula
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
from .state_dict_keys import Variant, check_variant, written_permutation


class FlowConfig(Protocol):
    """The settings of the reference implementation that ``build_msflow_model`` reads.

    ``c_conds``: channels of the condition per level; ``parallel_blocks``: coupling blocks per level; ``clamp_alpha``:
    bound of the log-scales.
    """

    @property
    def c_conds(self) -> Sequence[int]: ...
    @property
    def parallel_blocks(self) -> Sequence[int]: ...
    @property
    def clamp_alpha(self) -> float: ...


def build_msflow_model(
    c: FlowConfig, c_feats: Sequence[int], variant: Variant = "auto", backend: Backend = "auto"
) -> tuple[list[DropInParallelFlow], DropInFusionFlow]:
    """Builds (parallel flows, one per level; fusion flow), in place of the original's function of this name.

    ``c_feats``: channels C_l of the levels, which must be even. ``parallel_flow(x, [condition])`` returns (z, log_det),
    and ``fusion_flow([z0, z1, z2])`` returns ([z0, z1, z2], log_det); ``rev=True`` inverts both. State dicts are the
    original's; safetensors saves the flows with ``save_model``. New permutations are FrEIA 0.2's (dense) unless
    ``variant`` is ``"master"``; a checkpoint that is loaded brings its own layout and order of permutations.
    ``variant``: FrEIA's formula for the soft clamp, see ``load_official``; for a file with index permutations
    ``"auto"`` takes clamp tanh(r) and warns (InputWarning) that the file may mean the other formula. ``backend``: see
    fastmsflow.backend.

    Raises: InputError if a setting is missing or the numbers of levels differ.
    """
    missing = [name for name in ("c_conds", "parallel_blocks", "clamp_alpha") if not hasattr(c, name)]
    if missing:
        raise InputError(f"the configuration lacks {', '.join(missing)}; MSFlow's has them")
    check_variant(variant)
    if not len(c_feats) == len(c.c_conds) == len(c.parallel_blocks):
        raise InputError(
            f"c_feats {tuple(c_feats)}, c_conds {tuple(c.c_conds)} and parallel_blocks {tuple(c.parallel_blocks)} must"
            " name the same number of levels"
        )
    odd = [channels for channels in c_feats if channels <= 0 or channels % 2]
    if odd:
        raise InputError(f"c_feats holds {odd[0]}: a coupling splits channels in halves, so they must be even")
    check(backend)
    parallel = [
        DropInParallelFlow([_block(channels, d, c.clamp_alpha, variant) for _ in range(n)], backend)
        for channels, d, n in zip(c_feats, c.c_conds, c.parallel_blocks, strict=True)
    ]
    if variant == "auto":
        # Only the first level has the hook, so that there is one warning for a file.
        parallel[0].register_load_state_dict_pre_hook(_warn_of_indices)
    halves = [channels // 2 for channels in c_feats]
    permutations = [
        DropInPermutation(*_frozen(perm, invert_permutation(perm))) for perm in map(torch.randperm, c_feats)
    ]
    coupling = DropInCoupling(_fusion_subnet(halves), _fusion_subnet(halves), c.clamp_alpha)
    return parallel, DropInFusionFlow(permutations, coupling, backend)


def _block(channels: int, condition_channels: int, clamp: float, variant: Variant) -> DropInBlock:
    own = ConditionedSubnet(channels // 2, condition_channels, channels)
    return DropInBlock(
        nn.Parameter(torch.full((1, channels, 1, 1), initial_global_scale())),
        nn.Parameter(torch.zeros(1, channels, 1, 1)),
        *_frozen(*written_permutation(torch.randperm(channels), dense=variant != "master")),
        subnet=DropInSubnet(own.conv1, own.norm, own.conv2),
        clamp=clamp,
        variant=variant,
    )


def _warn_of_indices(_: nn.Module, state: dict[str, torch.Tensor], prefix: str, *others: Any) -> None:
    perm = state.get(f"{prefix}module_list.0.w_perm")
    if perm is not None and perm.ndim == 1:
        warn_of_either_formula("the checkpoint", "FILE")


def _fusion_subnet(channels: Sequence[int]) -> DropInFusionSubnet:
    own = FusionSubnet(channels)
    return DropInFusionSubnet(DropInCrossConvolutions(own.conv1, own.norm, own.conv2), own.conv_s, own.conv_t)


def _frozen(perm: torch.Tensor, inverse: torch.Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(perm, requires_grad=False), nn.Parameter(inverse, requires_grad=False)
