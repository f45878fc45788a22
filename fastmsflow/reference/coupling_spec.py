"""The settings of a coupling, which the reference, the operations and the modules share."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .clamp_forms import ClampForm

# FrEIA multiplies what a parallel flow's subnet returns by this before anything else.
SUBNET_SCALE = 0.1
OUTPUT_LIMIT = 1e6

Halves = tuple[Tensor | None, Tensor]
"""x1, which passes through, and x2, which is transformed, (B, C / 2, H, W) each; x1 is None if only x2 is wanted."""

CouplingResult = Literal["halves", "concat", "likelihood"]
"""``halves``: z as two tensors. ``concat``: z as one tensor. ``likelihood``: -0.5 mean over channels of z^2 in place of
z, which a kernel then never writes."""


@dataclass(frozen=True, kw_only=True)
class CouplingSpec:
    """Holds the settings of a coupling. The defaults are a parallel flow's; ``fusion`` makes a fusion flow's."""

    clamp: float
    """The bound of the log-scales."""
    form: ClampForm = "tanh"
    """The form of the soft clamp: see fastmsflow.reference.clamp_forms."""
    raw_scale: float = SUBNET_SCALE
    """A factor on the subnet's output."""
    bounded: bool = False
    """True cuts z off at +-1e6, or at the largest value of its dtype."""
    result: CouplingResult = "halves"
    with_log_det: bool = True
    """False saves the computation of log_det; None is returned in its place."""

    @classmethod
    def fusion(
        cls, clamp: float, *, bounded: bool = False, result: CouplingResult = "concat", with_log_det: bool = True
    ) -> "CouplingSpec":
        """Returns the settings of a coupling across levels (arXiv 2308.15300)."""
        return cls(clamp=clamp, form="atan", raw_scale=1.0, bounded=bounded, result=result, with_log_det=with_log_det)

    def limit(self, dtype: torch.dtype) -> float | None:
        """Returns the bound of |z| for tensors of ``dtype``, or None if z is not bounded."""
        return output_limit(dtype) if self.bounded else None


@dataclass(frozen=True, kw_only=True, eq=False)
class GlobalAffine:
    """Holds what follows a coupling within a level: y g + o per channel, then a permutation of the channels."""

    scale: Tensor
    """(C,) the parameter behind the gain: g = 0.1 softplus(scale, beta = 0.5)."""
    offset: Tensor
    """(C,) the offset o."""
    perm: Tensor
    """(C,) int64: z[:, i] = y[:, perm[i]]."""
    inverse_perm: Tensor
    """(C,) int64: argsort(perm), which the kernels' backward pass and the inverse need."""


def output_limit(dtype: torch.dtype) -> float:
    """Returns the bound of the fusion flow's output: 1e6, or the largest value of ``dtype`` (float16: 65504)."""
    return min(OUTPUT_LIMIT, torch.finfo(dtype).max)
