"""Affine couplings with their log-determinants: soft clamp, affine, global affine, channel permutation.

Source: Kingma & Dhariwal's Glow coupling as FrEIA's ``AllInOneBlock`` lays it out.
"""

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .clamp_forms import soft_clamp
from .coupling_spec import CouplingSpec, GlobalAffine, Halves, output_limit
from .dtypes import accumulation_dtype
from .likelihood import log_likelihood_map


def coupling(
    x: Halves, raw: Tensor, bias: Tensor | None = None, *, spec: CouplingSpec, affine: GlobalAffine | None = None
) -> tuple[list[Tensor], Tensor | None]:
    """Couples the halves of x: y = concat(x1, x2 exp(s) + t), then the global affine and the permutation if given.

    s and t are the halves of raw_scale (raw + bias), s after the soft clamp. ``raw`` (B, C, H, W): log-scales of x2's
    channels, then as many shifts; ``bias`` (C,): the part of raw that its convolution left out.

    Returns what ``spec.result`` says, of x2's dtype (the likelihood in float32 or better), and log_det (B,) in float32
    or better, or None if it is not wanted.
    Raises: InputError if the soft clamp's form is not known.
    """
    x1, x2 = x
    y, log_det = affine_forward(x2, *_split(raw, bias, spec.raw_scale), spec)
    if x1 is not None:
        y = torch.cat((x1, y), dim=1)
    if affine is not None:
        y, log_det_global = global_affine_forward(y, affine.scale, affine.offset, spec.with_log_det)
        y = permute_channels(y, affine.perm, affine.inverse_perm)
        log_det = add_log_dets([log_det, log_det_global])
    if spec.bounded:
        y = clamp_output(y)
    if spec.result == "likelihood":
        return [log_likelihood_map(y)], log_det
    return list(y.chunk(2, dim=1)) if spec.result == "halves" else [y], log_det


def coupling_inverse(
    z: Tensor, raw: Tensor, *, spec: CouplingSpec, affine: GlobalAffine | None = None
) -> tuple[Tensor, Tensor]:
    """Inverts ``coupling``, except for the bound on z; returns x and the log_det (B,) of this direction.

    z (B, C, H, W), raw (B, C, H, W). Without ``affine`` z is the transformed half alone, (B, C / 2, H, W).
    Raises: InputError if the soft clamp's form is not known.
    """
    raw_s, t = _split(raw, None, spec.raw_scale)
    if affine is None:
        return affine_inverse(z, raw_s, t, spec)
    y, log_det_global = global_affine_inverse(
        permute_channels(z, affine.inverse_perm, affine.perm), affine.scale, affine.offset
    )
    y1, y2 = y.chunk(2, dim=1)
    x2, log_det = affine_inverse(y2, raw_s, t, spec)
    return torch.cat((y1, x2), dim=1), log_det + log_det_global


def invert_first_half(z: Tensor, affine: GlobalAffine) -> Tensor:
    """Returns the first half of x, (B, C / 2, H, W), from z alone: the subnet reads it before ``coupling_inverse``."""
    half = z.shape[1] // 2
    y1 = z[:, affine.inverse_perm[:half]]
    return global_affine_inverse(y1, affine.scale[:half], affine.offset[:half])[0]


def affine_forward(x: Tensor, raw_s: Tensor, t: Tensor, spec: CouplingSpec) -> tuple[Tensor, Tensor | None]:
    """y = x exp(s) + t with s = soft_clamp(raw_s); returns y (dtype of x) and log_det (B,) = the sum of s, or None."""
    wide = accumulation_dtype(x.dtype)
    s = soft_clamp(raw_s.to(wide), spec.clamp, spec.form)
    log_det = s.sum(dim=(1, 2, 3)) if spec.with_log_det else None
    y = torch.addcmul(t.to(wide), x.to(wide), s.exp_())
    return y.to(x.dtype), log_det


def affine_inverse(y: Tensor, raw_s: Tensor, t: Tensor, spec: CouplingSpec) -> tuple[Tensor, Tensor]:
    """x = (y - t) exp(-s); returns x (dtype of y) and the inverse's log_det (B,) = minus the sum of s."""
    wide = accumulation_dtype(y.dtype)
    s = soft_clamp(raw_s.to(wide), spec.clamp, spec.form)
    x = (y.to(wide) - t.to(wide)) * (-s).exp()
    return x.to(y.dtype), -s.sum(dim=(1, 2, 3))


def global_gain(global_scale: Tensor) -> Tensor:
    """g = 0.1 softplus(global_scale, beta = 0.5), (C,), in float32 or better."""
    return 0.1 * F.softplus(global_scale.to(accumulation_dtype(global_scale.dtype)), beta=0.5)


def initial_global_scale(gain: float = 1.0) -> float:
    """Returns the global_scale whose gain is ``gain``: 2 ln(exp(5 gain) - 1)."""
    return 2.0 * math.log(math.expm1(5.0 * gain))


def global_affine_forward(x: Tensor, scale: Tensor, offset: Tensor, with_log_det: bool) -> tuple[Tensor, Tensor | None]:
    """x g + o per channel; returns it (dtype of x) and log_det () = H W sum_c log g_c, or None."""
    gain = global_gain(scale)
    y = torch.addcmul(offset.to(gain.dtype)[:, None, None], x.to(gain.dtype), gain[:, None, None])
    return y.to(x.dtype), x.shape[2] * x.shape[3] * gain.log().sum() if with_log_det else None


def global_affine_inverse(y: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """(y - o) / g per channel; returns it (dtype of y) and the inverse's log_det ()."""
    gain = global_gain(scale)
    x = (y - offset.to(gain.dtype)[:, None, None]) / gain[:, None, None]
    return x.to(y.dtype), -y.shape[2] * y.shape[3] * gain.log().sum()


def permute_channels(x: Tensor, perm: Tensor, inverse_perm: Tensor) -> Tensor:
    """z[:, i] = x[:, perm[i]]; ``perm`` and its inverse are int64 (C,)."""
    # A compiler fuses the index, and its gradient, with what stands around them.
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad):
        return x[:, perm]
    return PermuteChannels.apply(x, perm, inverse_perm)


class PermuteChannels(torch.autograd.Function):
    """Permutes channels, and gradients by the inverse; the gradient of an index would be scattered, which is slow."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, perm: Tensor, inverse_perm: Tensor) -> Tensor:
        return x[:, perm]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor) -> tuple[Tensor, None, None]:
        perm, inverse_perm = ctx.saved_tensors
        return permute_channels(grad_z, inverse_perm, perm), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        perm, _inverse_perm = ctx.saved_tensors
        return tangent[:, perm]


def invert_permutation(perm: Tensor) -> Tensor:
    """Returns the permutation that undoes ``perm``."""
    return torch.argsort(perm)


def clamp_output(z: Tensor) -> Tensor:
    """Bounds the fusion flow's output to +-1e6, or to what its dtype holds."""
    return z.clamp(-output_limit(z.dtype), output_limit(z.dtype))


def add_log_dets(log_dets: Sequence[Tensor | None]) -> Tensor | None:
    """Adds log_dets up; the sum is None if none was wanted."""
    wanted = [log_det for log_det in log_dets if log_det is not None]
    return reduce(torch.add, wanted) if wanted else None


def _split(raw: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Returns log-scales and shifts."""
    wide = raw.to(accumulation_dtype(raw.dtype))
    if bias is not None:
        wide = wide + bias.to(wide.dtype)[:, None, None]
    raw_s, t = (wide * scale).chunk(2, dim=1)
    return raw_s, t
