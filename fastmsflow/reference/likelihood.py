"""The likelihood of latents under a standard normal."""

from collections.abc import Sequence

from torch import Tensor

from .dtypes import accumulation_dtype


def log_likelihood_map(z: Tensor) -> Tensor:
    """-0.5 mean over channels of z^2, (B, H, W) in float32 or better, for z (B, C, H, W)."""
    return -0.5 * z.to(accumulation_dtype(z.dtype)).square().mean(dim=1)


def log_likelihood_maps(z: Sequence[Tensor]) -> list[Tensor]:
    """Computes the ``log_likelihood_map`` of each level."""
    return [log_likelihood_map(level) for level in z]


def negative_log_likelihood(logp: Sequence[Tensor], channels: Sequence[int], log_det: Tensor) -> Tensor:
    """0.5 sum z^2 - log_det per image, (B,), in nats, without the constant 0.5 N ln(2 pi).

    ``logp``: log-likelihood maps (B, H_l, W_l) of the levels; ``channels``: C_l of each; ``log_det`` (B,).
    """
    return -sum(c * level.sum(dim=(1, 2)) for c, level in zip(channels, logp, strict=True)) - log_det
