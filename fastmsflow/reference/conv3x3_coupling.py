"""3x3 convolution and the coupling that its outputs drive: the second half of a subnet, and what follows it."""

from torch import Tensor

from .conv3x3 import conv3x3
from .coupling import coupling
from .coupling_spec import CouplingSpec, GlobalAffine, Halves


def conv3x3_coupling(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    x: Halves,
    *,
    spec: CouplingSpec,
    affine: GlobalAffine | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """Couples the halves of x by raw = conv3x3(hidden, weight, bias): see fastmsflow.reference.coupling.coupling.

    hidden (B, I, H, W); weight (C, I, 3, 3); bias (C,), which may be in float32; x1, x2 (B, C / 2, H, W).
    """
    return coupling(x, conv3x3(hidden, weight, bias), spec=spec, affine=affine)
