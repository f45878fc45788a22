"""Log-likelihood at the image's size -> scores of the image."""

from torch import Tensor

from ..errors import InputError


def image_scores(log_likelihood: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """L (B, H, W), at most 0 -> means of 1 - exp(L) and of -L, (B,) each, over the int(H W ``fraction``) least likely
    pixels of each image (at least one)."""
    least_likely = (-log_likelihood).flatten(1).topk(pixels_scored(log_likelihood, fraction), dim=1).values
    return (1 - (-least_likely).exp()).mean(dim=1), least_likely.mean(dim=1)


def pixels_scored(log_likelihood: Tensor, fraction: float) -> int:
    """How many pixels of an image its scores average. Errors: InputError where ``fraction`` is not within 0 and 1."""
    if not 0 <= fraction <= 1:
        raise InputError(f"top_k is {fraction}; it is a share of an image's pixels, at most 1")
    return max(1, int(log_likelihood[0].numel() * fraction))
