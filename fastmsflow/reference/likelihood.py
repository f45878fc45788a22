"""Likelihood of latents under a standard normal."""

from collections.abc import Sequence

from torch import Tensor

from .dtypes import accumulation_dtype


def squared_norm(z: Sequence[Tensor]) -> Tensor:
    """sum over levels, channels and pixels of z^2, (B,), in float32 or better."""
    return sum(level.to(accumulation_dtype(level.dtype)).square().sum(dim=(1, 2, 3)) for level in z)


def negative_log_likelihood(z: Sequence[Tensor], log_det: Tensor) -> Tensor:
    """0.5 sum z^2 - log_det per image, (B,), in nats, without the constant 0.5 N ln(2 pi)."""
    return 0.5 * squared_norm(z) - log_det


def log_likelihood_maps(z: Sequence[Tensor]) -> list[Tensor]:
    """-0.5 mean over channels of z^2 per level: (B, H_l, W_l) each, in float32 or better."""
    return [-0.5 * level.to(accumulation_dtype(level.dtype)).square().mean(dim=1) for level in z]
