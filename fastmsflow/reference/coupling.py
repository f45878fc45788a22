"""Soft clamp, affine coupling, global affine, channel permutation and their log-determinants (Kingma & Dhariwal's
Glow coupling as FrEIA's ``AllInOneBlock`` lays it out)."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .dtypes import accumulation_dtype
from .fusion import clamp_output
from .likelihood import log_likelihood_map

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
    log_det = s.sum(dim=(1, 2, 3))
    y = torch.addcmul(t.to(wide), x.to(wide), s.exp_())
    return y.to(x.dtype), log_det


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
    y = torch.addcmul(global_offset.to(gain.dtype)[:, None, None], x.to(gain.dtype), gain[:, None, None])
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


def coupling(
    x: Tensor,
    raw: Tensor,
    global_scale: Tensor,
    global_offset: Tensor,
    perm: Tensor,
    clamp: float,
    form: ClampForm,
) -> tuple[Tensor, Tensor]:
    """One block of a parallel flow, its subnet's output being ``raw``.

    x (B, C, H, W); raw (B, 2 b, H, W): log-scales and shifts of x's last b channels; global_scale, global_offset (C,);
    perm int64 (C,) -> z of x's shape and dtype, log_det (B,) in float32 or better.
    """
    kept, changed, raw_s, t = _split(x, raw)
    y, log_det = affine_forward(changed, raw_s, t, clamp, form)
    y, log_det_global = global_affine_forward(torch.cat((kept, y), dim=1), global_scale, global_offset)
    return permute_channels(y, perm), log_det + log_det_global


def coupling_inverse(
    z: Tensor,
    raw: Tensor,
    global_scale: Tensor,
    global_offset: Tensor,
    perm: Tensor,
    clamp: float,
    form: ClampForm,
) -> tuple[Tensor, Tensor]:
    """The inverse of ``coupling``: z -> x, and the log_det (B,) of this direction."""
    y = permute_channels(z, invert_permutation(perm))
    y, log_det_global = global_affine_inverse(y, global_scale, global_offset)
    kept, changed, raw_s, t = _split(y, raw)
    x, log_det = affine_inverse(changed, raw_s, t, clamp, form)
    return torch.cat((kept, x), dim=1), log_det + log_det_global


def kept_channels(z: Tensor, global_scale: Tensor, global_offset: Tensor, inverse_perm: Tensor, kept: int) -> Tensor:
    """The first ``kept`` channels of x, from z alone: what the subnet needs before ``coupling_inverse``."""
    y = permute_channels(z, inverse_perm[:kept])
    return global_affine_inverse(y, global_scale[:kept], global_offset[:kept])[0]


def cross_coupling(x: Tensor, raw: Tensor, clamp: float) -> tuple[Tensor, Tensor]:
    """The fusion flow's coupling of a level: x (B, b, H, W), raw (B, 2 b, H, W) -> y of x's shape, log_det (B,)."""
    _, changed, raw_s, t = _split(x, raw, scale=1.0)
    return affine_forward(changed, raw_s, t, clamp, "atan")


def cross_coupling_inverse(y: Tensor, raw: Tensor, clamp: float) -> tuple[Tensor, Tensor]:
    """The inverse of ``cross_coupling``: y -> x, and the log_det (B,) of this direction."""
    _, changed, raw_s, t = _split(y, raw, scale=1.0)
    return affine_inverse(changed, raw_s, t, clamp, "atan")


def joining_cross_coupling(kept: Tensor, x: Tensor, raw: Tensor, clamp: float) -> tuple[Tensor, Tensor]:
    """``cross_coupling`` of x, behind the kept channels, bounded to +-1e6: (B, a + b, H, W), log_det (B,)."""
    y, log_det = cross_coupling(x, raw, clamp)
    return clamp_output(torch.cat((kept, y), dim=1)), log_det


def joining_cross_coupling_likelihood(kept: Tensor, x: Tensor, raw: Tensor, clamp: float) -> tuple[Tensor, Tensor]:
    """The log-likelihood map of what ``joining_cross_coupling`` returns, (B, H, W), in its place; log_det (B,)."""
    z, log_det = joining_cross_coupling(kept, x, raw, clamp)
    return log_likelihood_map(z), log_det


def _split(x: Tensor, raw: Tensor, scale: float = SUBNET_SCALE) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> kept and changed channels of x, log-scales, shifts."""
    changed = raw.shape[1] // 2
    scaled = raw.to(accumulation_dtype(raw.dtype)) * scale
    return x[:, : x.shape[1] - changed], x[:, x.shape[1] - changed :], scaled[:, :changed], scaled[:, changed:]
