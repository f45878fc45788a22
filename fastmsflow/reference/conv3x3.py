"""The 3x3 convolutions of the subnets, stride 1, zero padding 1; alone, and with what follows them."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .coupling import (
    ClampForm,
    coupling,
    fusion_coupling,
    fusion_coupling_concat,
    fusion_coupling_concat_likelihood,
)
from .fusion import split_and_upsample
from .layer_norm import layer_norm_relu


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (B, I, H, W), weight (O, I, 3, 3), bias (O,), which may be in float32, -> (B, O, H, W)."""
    return F.conv2d(x, weight, None if bias is None else bias.to(weight.dtype), padding=1)


def conv3x3_layer_norm_relu(
    x: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, condition: Tensor
) -> Tensor:
    """relu(layer_norm(conv3x3(x, weight) + condition)); condition (1, O, H, W), or a bias (1, O, 1, 1)."""
    return layer_norm_relu(conv3x3(x, weight), norm_weight, norm_bias, condition)


def conv3x3_split_and_upsample(hidden: Tensor, weight: Tensor, bias: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
    """``split_and_upsample`` of relu(conv3x3(hidden, weight, bias))."""
    return split_and_upsample(conv3x3(hidden, weight, bias), None, maps)


def conv3x3_coupling(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    x1: Tensor,
    x2: Tensor,
    global_scale: Tensor,
    global_offset: Tensor,
    perm: Tensor,
    inverse_perm: Tensor,
    clamp: float,
    form: ClampForm,
    with_log_det: bool = True,
) -> tuple[list[Tensor], Tensor | None]:
    """``coupling`` of halves x1, x2 (B, C / 2, H, W), driven by conv3x3(hidden, weight, bias): (B, C, H, W)."""
    raw = conv3x3(hidden, weight, bias)
    affine = (global_scale, global_offset, perm, inverse_perm)
    return coupling(x1, x2, raw, None, *affine, clamp, form, with_log_det)


def conv3x3_fusion_coupling(
    hidden: Tensor, weight: Tensor, bias: Tensor, x: Tensor, clamp: float, with_log_det: bool = True
) -> tuple[Tensor, Tensor | None]:
    """``fusion_coupling`` of x (B, b, H, W), driven by conv3x3(hidden, weight, bias)."""
    return fusion_coupling(x, conv3x3(hidden, weight, bias), None, clamp, with_log_det)


def conv3x3_fusion_coupling_concat(
    hidden: Tensor, weight: Tensor, bias: Tensor, x1: Tensor, x2: Tensor, clamp: float, with_log_det: bool = True
) -> tuple[Tensor, Tensor | None]:
    """``fusion_coupling_concat`` of x1 and x2, driven by conv3x3(hidden, weight, bias)."""
    return fusion_coupling_concat(x1, x2, conv3x3(hidden, weight, bias), None, clamp, with_log_det)


def conv3x3_fusion_coupling_concat_likelihood(
    hidden: Tensor, weight: Tensor, bias: Tensor, x1: Tensor, x2: Tensor, clamp: float, with_log_det: bool = True
) -> tuple[Tensor, Tensor | None]:
    """``fusion_coupling_concat_likelihood`` of x1 and x2, driven by conv3x3(hidden, weight, bias)."""
    return fusion_coupling_concat_likelihood(x1, x2, conv3x3(hidden, weight, bias), None, clamp, with_log_det)
