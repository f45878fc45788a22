"""Scores of an image from its log-likelihood map at the image's size."""

import torch
from torch import Tensor, library

from ..backend import Backend, uses_triton
from ..reference import image_score as reference


def image_scores(log_likelihood: Tensor, fraction: float, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """Computes fastmsflow.reference.image_score.image_scores. By Triton, not differentiable.

    Raises: InputError if ``fraction`` is not within 0 and 1.
    """
    if not uses_triton(backend, log_likelihood):
        return reference.image_scores(log_likelihood, fraction)
    score, log_score = _image_scores(log_likelihood, reference.pixels_scored(log_likelihood, fraction))
    return score, log_score


@library.custom_op("fastmsflow::image_scores", mutates_args=())
def _image_scores(log_likelihood: Tensor, count: int) -> Tensor:
    from ..kernels import image_score as kernels

    return kernels.image_scores(log_likelihood, count)


@_image_scores.register_fake
def _(log_likelihood: Tensor, count: int) -> Tensor:
    return log_likelihood.new_empty((2, log_likelihood.shape[0]), dtype=torch.float32)
