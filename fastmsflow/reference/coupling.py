"""Soft clamp, affine coupling, global affine, channel permutation and their log-determinants (Kingma & Dhariwal's
Glow coupling as FrEIA's ``AllInOneBlock`` lays it out)."""

import math
from collections.abc import Sequence
from functools import reduce
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


def affine_forward(
    x: Tensor, raw_s: Tensor, t: Tensor, clamp: float, form: ClampForm, with_log_det: bool = True
) -> tuple[Tensor, Tensor | None]:
    """y = x exp(s) + t with s = soft_clamp(raw_s); returns y (dtype of x) and log_det (B,) = the sum of s.

    The log_det is None where it is not wanted, as in all that follows.
    """
    wide = accumulation_dtype(x.dtype)
    s = soft_clamp(raw_s.to(wide), clamp, form)
    log_det = s.sum(dim=(1, 2, 3)) if with_log_det else None
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


def global_affine_forward(
    x: Tensor, global_scale: Tensor, global_offset: Tensor, with_log_det: bool = True
) -> tuple[Tensor, Tensor | None]:
    """x g + o per channel; returns it (dtype of x) and log_det () = H W sum_c log g_c."""
    gain = global_gain(global_scale)
    y = torch.addcmul(global_offset.to(gain.dtype)[:, None, None], x.to(gain.dtype), gain[:, None, None])
    return y.to(x.dtype), x.shape[2] * x.shape[3] * gain.log().sum() if with_log_det else None


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
    x1: Tensor,
    x2: Tensor,
    raw: Tensor,
    bias: Tensor | None,
    global_scale: Tensor,
    global_offset: Tensor,
    perm: Tensor,
    inverse_perm: Tensor,
    clamp: float,
    form: ClampForm,
    with_log_det: bool = True,
) -> tuple[list[Tensor], Tensor | None]:
    """One block of a parallel flow, its subnet's output being ``raw``, and ``bias`` where the convolution left it out.

    Halves x1, x2 (B, C / 2, H, W) of x; raw (B, C, H, W) and bias (C,): log-scales, then shifts, of x2's channels;
    global_scale, global_offset (C,); perm int64 (C,), with z[:, i] = y[:, perm[i]]; inverse_perm: argsort(perm), which
    the kernel needs, here without a part -> [z1, z2], halves of z, of x's dtype, log_det (B,) in float32 or better.
    """
    raw_s, t = _split(raw, bias)
    y, log_det = affine_forward(x2, raw_s, t, clamp, form, with_log_det)
    y, log_det_global = global_affine_forward(torch.cat((x1, y), dim=1), global_scale, global_offset, with_log_det)
    return list(permute_channels(y, perm).chunk(2, dim=1)), add_log_dets([log_det, log_det_global])


def coupling_inverse(
    z: Tensor,
    raw: Tensor,
    global_scale: Tensor,
    global_offset: Tensor,
    perm: Tensor,
    inverse_perm: Tensor,
    clamp: float,
    form: ClampForm,
) -> tuple[Tensor, Tensor]:
    """The inverse of ``coupling``: z (B, C, H, W) -> x, and the log_det (B,) of this direction."""
    y = permute_channels(z, inverse_perm)
    y, log_det_global = global_affine_inverse(y, global_scale, global_offset)
    y1, y2 = y.chunk(2, dim=1)
    x2, log_det = affine_inverse(y2, *_split(raw), clamp, form)
    return torch.cat((y1, x2), dim=1), log_det + log_det_global


def add_log_dets(log_dets: Sequence[Tensor | None]) -> Tensor | None:
    """Adds log_dets up; the sum is None where none was wanted."""
    wanted = [log_det for log_det in log_dets if log_det is not None]
    return reduce(torch.add, wanted) if wanted else None


def kept_channels(z: Tensor, global_scale: Tensor, global_offset: Tensor, inverse_perm: Tensor, kept: int) -> Tensor:
    """The first ``kept`` channels of x, from z alone: what the subnet needs before ``coupling_inverse``."""
    y = permute_channels(z, inverse_perm[:kept])
    return global_affine_inverse(y, global_scale[:kept], global_offset[:kept])[0]


def fusion_coupling(
    x: Tensor, raw: Tensor, bias: Tensor | None, clamp: float, with_log_det: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The fusion flow's coupling of a level: x (B, b, H, W), raw (B, 2 b, H, W), and bias (2 b,) where the convolution
    left it out -> y of x's shape, log_det (B,)."""
    return affine_forward(x, *_split(raw, bias, scale=1.0), clamp, "atan", with_log_det)


def fusion_coupling_inverse(y: Tensor, raw: Tensor, clamp: float) -> tuple[Tensor, Tensor]:
    """The inverse of ``fusion_coupling``: y -> x, and the log_det (B,) of this direction."""
    return affine_inverse(y, *_split(raw, scale=1.0), clamp, "atan")


def fusion_coupling_concat(
    x1: Tensor, x2: Tensor, raw: Tensor, bias: Tensor | None, clamp: float, with_log_det: bool = True
) -> tuple[Tensor, Tensor | None]:
    """``fusion_coupling`` of x2, behind x1, bounded to +-1e6: (B, 2 b, H, W), log_det (B,)."""
    y, log_det = fusion_coupling(x2, raw, bias, clamp, with_log_det)
    return clamp_output(torch.cat((x1, y), dim=1)), log_det


def fusion_coupling_concat_likelihood(
    x1: Tensor, x2: Tensor, raw: Tensor, bias: Tensor | None, clamp: float, with_log_det: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The log-likelihood map of what ``fusion_coupling_concat`` returns, (B, H, W), in its place; log_det (B,)."""
    z, log_det = fusion_coupling_concat(x1, x2, raw, bias, clamp, with_log_det)
    return log_likelihood_map(z), log_det


def _split(raw: Tensor, bias: Tensor | None = None, scale: float = SUBNET_SCALE) -> tuple[Tensor, Tensor]:
    """-> log-scales, shifts."""
    wide = raw.to(accumulation_dtype(raw.dtype))
    if bias is not None:
        wide = wide + bias.to(wide.dtype)[:, None, None]
    raw_s, t = (wide * scale).chunk(2, dim=1)
    return raw_s, t
