"""The 3x3 convolutions of the subnets, stride 1, zero padding 1; alone, and with what follows them."""

import torch.nn.functional as F
from torch import Tensor

from .coupling import (
    ClampForm,
    coupling,
    cross_coupling,
    joining_cross_coupling,
    joining_cross_coupling_likelihood,
)
from .layer_norm import layer_norm_relu


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (B, I, H, W), weight (O, I, 3, 3), bias (O,) -> (B, O, H, W)."""
    return F.conv2d(x, weight, bias, padding=1)


def conv3x3_layer_norm_relu(
    x: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, condition: Tensor
) -> Tensor:
    """relu(layer_norm(conv3x3(x, weight) + condition)); condition (1, O, H, W)."""
    return layer_norm_relu(conv3x3(x, weight), norm_weight, norm_bias, condition)


def conv3x3_coupling(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    global_scale: Tensor,
    global_offset: Tensor,
    perm: Tensor,
    inverse_perm: Tensor,
    clamp: float,
    form: ClampForm,
) -> tuple[Tensor, Tensor]:
    """``coupling`` of x (B, C, H, W), driven by conv3x3(hidden, weight, bias): (B, 2 b, H, W), 2 b <= C.

    ``inverse_perm``: argsort(perm), which the kernel needs as well; here it has no part.
    """
    return coupling(x, conv3x3(hidden, weight, bias), global_scale, global_offset, perm, clamp, form)


def conv3x3_cross_coupling(
    hidden: Tensor, weight: Tensor, bias: Tensor, x: Tensor, clamp: float
) -> tuple[Tensor, Tensor]:
    """``cross_coupling`` of x (B, b, H, W), driven by conv3x3(hidden, weight, bias)."""
    return cross_coupling(x, conv3x3(hidden, weight, bias), clamp)


def conv3x3_joining_cross_coupling(
    hidden: Tensor, weight: Tensor, bias: Tensor, kept: Tensor, x: Tensor, clamp: float
) -> tuple[Tensor, Tensor]:
    """``joining_cross_coupling`` of kept and x, driven by conv3x3(hidden, weight, bias)."""
    return joining_cross_coupling(kept, x, conv3x3(hidden, weight, bias), clamp)


def conv3x3_joining_cross_coupling_likelihood(
    hidden: Tensor, weight: Tensor, bias: Tensor, kept: Tensor, x: Tensor, clamp: float
) -> tuple[Tensor, Tensor]:
    """``joining_cross_coupling_likelihood`` of kept and x, driven by conv3x3(hidden, weight, bias)."""
    return joining_cross_coupling_likelihood(kept, x, conv3x3(hidden, weight, bias), clamp)
