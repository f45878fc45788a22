"""Scores of an image from its log-likelihood map at the image's size."""

import torch
from torch import Tensor

from ..errors import InputError

LARGE = 2**24
"""Pixels of a map from which on PyTorch's search for the largest, 16 bytes a pixel, takes too much memory."""


def image_scores(log_likelihood: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Averages 1 - exp(L) and -L over the int(H W ``fraction``) least likely pixels of each image (at least one).

    ``log_likelihood``: L (B, H, W), at most 0. Returns the two means, (B,) each.
    Raises: InputError if ``fraction`` is not within 0 and 1.
    """
    count = pixels_scored(log_likelihood, fraction)
    if log_likelihood[0].numel() > LARGE and log_likelihood.device.type == "cpu" and not log_likelihood.requires_grad:
        least_likely = -torch.stack([_lowest(image, count) for image in log_likelihood])
    else:
        least_likely = (-log_likelihood).flatten(1).topk(count, dim=1).values
    return (1 - (-least_likely).exp()).mean(dim=1), least_likely.mean(dim=1)


def pixels_scored(log_likelihood: Tensor, fraction: float) -> int:
    """Returns how many pixels of an image its scores average.

    Raises: InputError if ``fraction`` is not within 0 and 1.
    """
    if not 0 <= fraction <= 1:
        raise InputError(f"top_k is {fraction}; it is a share of an image's pixels, at most 1")
    return max(1, int(log_likelihood[0].numel() * fraction))


def _lowest(values: Tensor, count: int) -> Tensor:
    """Returns the ``count`` lowest values, in any order."""
    copy = values.numpy().flatten()
    copy.partition(count - 1)
    return torch.from_numpy(copy[:count])
