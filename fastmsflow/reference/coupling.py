"""Soft clamp, affine coupling, global affine, channel permutation and their log-determinants (Kingma & Dhariwal's
Glow coupling as FrEIA's ``AllInOneBlock`` lays it out)."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .dtypes import accumulation_dtype

ClampForm = Literal["tanh", "scaled_tanh", "atan"]

# FrEIA scales what the subnet returns by this before anything else.
SUBNET_SCALE = 0.1
# 0.636 is FrEIA's rounding of 2/pi; trained weights depend on it.
ATAN_GAIN = 0.636


def soft_clamp(raw: Tensor, clamp: float, form: ClampForm) -> Tensor:
    """Bounds the log-scale to about +-clamp.

    ``tanh``: clamp tanh(raw) (FrEIA 0.2); ``scaled_tanh``: clamp tanh(raw / clamp) (FrEIA's git master since
    2023-08-17); ``atan``: 0.636 clamp atan(raw / clamp) (the fusion flow).
    """
    if form == "tanh":
        return clamp * torch.tanh(raw)
    if form == "scaled_tanh":
        return clamp * torch.tanh(raw / clamp)
    return ATAN_GAIN * clamp * torch.atan(raw / clamp)


def affine_forward(x: Tensor, raw_s: Tensor, t: Tensor, clamp: float, form: ClampForm) -> tuple[Tensor, Tensor]:
    """y = x exp(s) + t with s = soft_clamp(raw_s); returns y (dtype of x) and log_det (B,) = the sum of s."""
    wide = accumulation_dtype(x.dtype)
    s = soft_clamp(raw_s.to(wide), clamp, form)
    y = x.to(wide) * s.exp() + t.to(wide)
    return y.to(x.dtype), s.sum(dim=(1, 2, 3))


def affine_inverse(y: Tensor, raw_s: Tensor, t: Tensor, clamp: float, form: ClampForm) -> tuple[Tensor, Tensor]:
    """x = (y - t) exp(-s); returns x (dtype of y) and the inverse's log_det (B,) = minus the sum of s."""
    wide = accumulation_dtype(y.dtype)
    s = soft_clamp(raw_s.to(wide), clamp, form)
    x = (y.to(wide) - t.to(wide)) * (-s).exp()
    return x.to(y.dtype), -s.sum(dim=(1, 2, 3))


def global_gain(global_scale: Tensor) -> Tensor:
    """g = 0.1 softplus(global_scale, beta = 0.5), (C,), in float32 or better."""
    return 0.1 * F.softplus(global_scale.to(accumulation_dtype(global_scale.dtype)), beta=0.5)


def initial_global_scale(gain: float = 1.0) -> float:
    """The global_scale whose gain is ``gain``: 2 ln(exp(5 gain) - 1)."""
    return 2.0 * math.log(math.expm1(5.0 * gain))


def global_affine_forward(x: Tensor, global_scale: Tensor, global_offset: Tensor) -> tuple[Tensor, Tensor]:
    """x g + o per channel; returns it (dtype of x) and log_det () = H W sum_c log g_c."""
    gain = global_gain(global_scale)
    y = x * gain[:, None, None] + global_offset.to(gain.dtype)[:, None, None]
    return y.to(x.dtype), x.shape[2] * x.shape[3] * gain.log().sum()


def global_affine_inverse(y: Tensor, global_scale: Tensor, global_offset: Tensor) -> tuple[Tensor, Tensor]:
    """(y - o) / g per channel; returns it (dtype of y) and the inverse's log_det ()."""
    gain = global_gain(global_scale)
    x = (y - global_offset.to(gain.dtype)[:, None, None]) / gain[:, None, None]
    return x.to(y.dtype), -y.shape[2] * y.shape[3] * gain.log().sum()


def permute_channels(x: Tensor, perm: Tensor) -> Tensor:
    """z[:, i] = x[:, perm[i]]; ``perm`` is int64 (C,)."""
    return x[:, perm]


def invert_permutation(perm: Tensor) -> Tensor:
    """The permutation that undoes ``perm``."""
    return torch.argsort(perm)
