"""Flows with the structure, call and state dict of the reference implementation (arXiv 2308.15300).

This library computes them. Parameters have the names, shapes and order of the original, so its checkpoints and its
optimizers' states fit. Each class takes its modules or parameters from the caller: new ones (``build_model``) or those
of a live model (``accelerate``).
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..backend import Backend
from ..errors import InputError
from ..nn.coupling_block import CouplingBlock
from ..nn.fusion_flow import FusionFlow
from ..nn.parallel_flow import ParallelFlow
from ..nn.subnets import ConditionedSubnet, FusionSubnet
from ..nn.weight_cache import WeightCache
from ..reference.clamp_forms import ClampForm
from ..reference.coupling import invert_permutation, permute_channels
from .state_dict_keys import Variant, matched, read_permutation, refuse_masters_formula


class DropInSubnet(ConditionedSubnet):
    def __init__(self, conv1: nn.Conv2d, ln: nn.LayerNorm, conv2: nn.Conv2d) -> None:
        nn.Module.__init__(self)
        self.in_channels = conv2.out_channels // 2
        self.conv1, self.ln, self.conv2 = conv1, ln, conv2
        self._first, self._condition_map, self._wide = WeightCache(), WeightCache(), WeightCache()

    @property
    def norm(self) -> nn.LayerNorm:  # type: ignore[override]  # the original's has another name
        return self.ln


class DropInBlock(CouplingBlock):
    """FrEIA's ``AllInOneBlock`` as MSFlow builds it.

    ``w_perm``, ``w_perm_inv``: FrEIA 0.2's dense (C, C, 1, 1) matrices or its git master's (C,) indices. ``variant``:
    the formula of the soft clamp, whatever the permutations' layout; ``"auto"`` is 0.2's.
    """

    variant: Variant

    def __init__(
        self,
        global_scale: nn.Parameter,
        global_offset: nn.Parameter,
        w_perm: nn.Parameter,
        w_perm_inv: nn.Parameter,
        *,
        subnet: DropInSubnet,
        clamp: float,
        variant: Variant = "auto",
    ) -> None:
        nn.Module.__init__(self)
        self.half_channels = global_scale.numel() // 2
        self.clamp = clamp
        self.variant = variant
        self.global_scale, self.global_offset = global_scale, global_offset
        self.w_perm, self.w_perm_inv = w_perm, w_perm_inv
        self.subnet = subnet
        self._wide = WeightCache()
        self._read: tuple[object, Tensor, Tensor] | None = None
        self.register_load_state_dict_pre_hook(DropInBlock._take_layout)

    @property
    def clamp_form(self) -> ClampForm:  # type: ignore[override]  # follows ``variant``
        refuse_masters_formula(self.variant, self.w_perm.ndim == 4, "w_perm")
        return "scaled_tanh" if self.variant == "master" else "tanh"

    @property
    def _affine(self) -> tuple[Tensor, Tensor]:
        return self.global_scale.flatten(), self.global_offset.flatten()

    def _perms(self, output_perm: Tensor | None) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            dense = self.w_perm.ndim == 4
            perm = self.w_perm[:, :, 0, 0].argmax(dim=1) if dense else self.w_perm
            return perm, invert_permutation(perm)
        # A live model may be loaded after it was accelerated, so the parameter itself is watched.
        state = (self.w_perm._version, self.w_perm.data_ptr(), self.w_perm_inv._version, self.w_perm_inv.data_ptr())
        if self._read is None or self._read[0] != state:
            faults: list[str] = []
            # Tensors made in inference mode could not enter a later training step.
            with torch.inference_mode(False):
                perm = read_permutation(self.w_perm.detach(), self.w_perm_inv.detach(), "w_perm", faults)
                inverse = invert_permutation(perm)
            if faults:
                raise InputError(f"{faults[0]}; MSFlow has no other (permute_soft, householder)")
            self._read = state, perm, inverse
        return self._read[1:]

    def _take_layout(self, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        """Makes room for permutations in the other layout."""
        self._read = None  # the new ones may come to lie where others lay before
        new = state.get(f"{prefix}w_perm")
        if new is not None and new.ndim != self.w_perm.ndim:
            for name in ("w_perm", "w_perm_inv"):
                room = torch.empty_like(state[prefix + name], device=self.w_perm.device)
                setattr(self, name, nn.Parameter(room, requires_grad=False))


class DropInParallelFlow(ParallelFlow):
    """The flow of one level: ``flow(x, [condition], rev=False)`` returns (z, log_det (B,)).

    The condition is (B, D, H, W), or (1, D, H, W) for all images.
    """

    backend: Backend

    def __init__(self, blocks: Sequence[DropInBlock], backend: Backend = "auto") -> None:
        nn.Module.__init__(self)
        self.module_list = nn.ModuleList(blocks)
        self.backend = backend

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]  # the original's has another name
        return self.module_list

    def forward(  # type: ignore[override]  # the original's call
        self, x_or_z: Tensor, c: Sequence[Tensor] | Tensor, rev: bool = False, jac: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Runs the flow; ``jac`` is accepted for compatibility, the log_det is always returned."""
        condition = shared_condition(c if isinstance(c, Tensor) else c[0])
        run = ParallelFlow.inverse if rev else ParallelFlow.forward
        return run(self, x_or_z, condition, self.backend)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Loads a state dict as the original does, but raises if it does not fit even if ``strict`` is False."""
        return super().load_state_dict(state_dict, True, assign)


class DropInPermutation(nn.Module):
    def __init__(self, perm: nn.Parameter, perm_inv: nn.Parameter) -> None:
        super().__init__()
        self.perm, self.perm_inv = perm, perm_inv


class DropInCrossConvolutions(nn.Module):
    def __init__(self, conv1: nn.Conv2d, norm: nn.LayerNorm, conv2: nn.Conv2d) -> None:
        super().__init__()
        self.conv1, self.norm, self.conv2 = conv1, norm, conv2


class DropInFusionSubnet(FusionSubnet):
    def __init__(self, cross_convs: DropInCrossConvolutions, conv_s: nn.ModuleList, conv_t: nn.ModuleList) -> None:
        nn.Module.__init__(self)
        self.cross_convs, self.conv_s, self.conv_t = cross_convs, conv_s, conv_t
        self._heads = WeightCache()

    @property
    def conv1(self) -> nn.Conv2d:  # type: ignore[override]  # the original's has another name
        return self.cross_convs.conv1

    @property
    def norm(self) -> nn.LayerNorm:  # type: ignore[override]  # the original's has another name
        return self.cross_convs.norm

    @property
    def conv2(self) -> nn.Conv2d:  # type: ignore[override]  # the original's has another name
        return self.cross_convs.conv2


class DropInCoupling(FusionFlow):
    def __init__(self, subnet_1: DropInFusionSubnet, subnet_2: DropInFusionSubnet, clamp: float) -> None:
        nn.Module.__init__(self)
        self.clamp = clamp
        self.subnet_1, self.subnet_2 = subnet_1, subnet_2


class DropInFusionFlow(nn.Module):
    """The fusion flow: ``fusion([x0, x1, x2], rev=False)`` returns ([z0, z1, z2], log_det (B,)).

    ``permutations`` may have any order; a level takes the one of its length, as the original's loader does. The order
    in a checkpoint that is loaded becomes this flow's order, so that the flow is saved in the same order.
    """

    backend: Backend

    def __init__(
        self, permutations: Sequence[DropInPermutation], coupling: DropInCoupling, backend: Backend = "auto"
    ) -> None:
        super().__init__()
        self.module_list = nn.ModuleList([*permutations, coupling])
        self.backend = backend
        self.register_load_state_dict_pre_hook(DropInFusionFlow._take_order)

    def forward(
        self, x_or_z: Sequence[Tensor], c: object = None, rev: bool = False, jac: bool = True
    ) -> tuple[list[Tensor], Tensor]:
        """Runs the flow; ``c`` and ``jac`` are accepted for compatibility and not used."""
        permutations, coupling = self._permutations_and_coupling()
        channels, lengths = [level.shape[1] for level in x_or_z], _lengths(permutations)
        places = matched(channels, lengths)
        if places is None:
            raise InputError(f"levels of {channels} channels given; this fusion flow permutes {lengths}")
        ordered = [permutations[place] for place in places]
        if rev:
            x, log_det = coupling.inverse(x_or_z, self.backend)
            return [permute_channels(a, p.perm_inv, p.perm) for a, p in zip(x, ordered, strict=True)], log_det
        permuted = [permute_channels(a, p.perm, p.perm_inv) for a, p in zip(x_or_z, ordered, strict=True)]
        return coupling(permuted, self.backend)

    def _permutations_and_coupling(self) -> tuple[list[DropInPermutation], DropInCoupling]:
        *permutations, coupling = self.module_list
        return cast(list[DropInPermutation], permutations), cast(DropInCoupling, coupling)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Loads a state dict as the original does, but raises if it does not fit even if ``strict`` is False."""
        return super().load_state_dict(state_dict, True, assign)

    def _take_order(self, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        """Puts the permutations into the places that those of their lengths have in the file."""
        permutations, _coupling = self._permutations_and_coupling()
        entries = [state.get(f"{prefix}module_list.{i}.perm") for i in range(len(permutations))]
        sources = matched([entry.numel() for entry in entries if entry is not None], _lengths(permutations))
        # Entries that do not fit are named when they are loaded.
        for place, source in enumerate(sources or ()):
            self.module_list[place] = permutations[source]


def shared_condition(condition: Tensor) -> Tensor:
    """The condition of one image where all images share it, as MSFlow's do: the subnet's part in it is computed once.

    Looked for in the values (a wait for the GPU) unless it shows in the strides; not in a graph under recording.
    """
    if len(condition) == 1 or condition.stride(0) == 0:
        return condition[:1]
    recording = condition.is_cuda and torch.cuda.is_current_stream_capturing()
    if torch.compiler.is_compiling() or recording or condition.requires_grad:
        return condition
    return condition[:1] if torch.equal(condition[1:], condition[:1].expand_as(condition[1:])) else condition


def _lengths(permutations: Sequence[DropInPermutation]) -> list[int]:
    return [p.perm.numel() for p in permutations]
