"""Latents -> anomaly scores and maps. Every score grows with abnormality; sums and maps are in float32 or better.

With logp_l = -0.5 mean over channels of z_l^2, and up() the bilinear map to the image's size:
L = sum_l up(logp_l) minus its maximum per image, peak; A = sum_l up(exp(logp_l - its maximum per image)) (arXiv
2308.15300). Both are relative to the image's own likeliest pixel; L + peak is not.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .backend import Backend
from .ops.image_score import image_scores
from .ops.likelihood import log_likelihood_maps
from .ops.score_map import score_maps

__all__ = ["TOP_K", "ImageScores", "Scores", "additive_score_map", "anomaly_scores", "score_log_likelihoods"]

TOP_K = 0.03
"""The published share of the pixels, the least likely ones, that an image's scores average."""


class Scores(NamedTuple):
    """What one pass over the latents yields, float32 or better."""

    score: Tensor
    """(B,) the published image score, in [0, 1]: mean of 1 - exp(L) over the ``top_k`` least likely pixels."""
    log_score: Tensor
    """(B,) mean of -L over the same pixels, in nats. On a model that fits badly exp(L) underflows and every published
    score is 1.0; this one keeps the images' order."""
    likelihood_add: Tensor
    """(B, H, W) A, between 0 and the number of levels; *small* where the image is abnormal."""
    log_likelihood: Tensor
    """(B, H, W) L, at most 0."""
    peak: Tensor
    """(B,) sum_l up(logp_l) at the image's likeliest pixel, at most 0: L + peak is comparable between images."""

    @property
    def absolute_score(self) -> Tensor:
        """(B,) mean of -(L + peak) over the same pixels, in nats, at least 0: not relative to the image itself, so
        comparable between images and days, and high also where a whole image is strange."""
        return self.log_score - self.peak

    @property
    def absolute_map(self) -> Tensor:
        """(B, H, W) -(L + peak) in nats, at least 0; large where the image is abnormal."""
        return -(self.log_likelihood + self.peak[:, None, None])

    @property
    def score_map_mul(self) -> Tensor:
        """(B, H, W) 1 - exp(L), in [0, 1]."""
        return 1 - self.log_likelihood.exp()

    def shown_map(self, levels: int, calibrated: bool) -> Tensor:
        """(B, H, W) what is shown of images, large where abnormal, comparable between them: the absolute map of a
        calibrated model; else, since nothing is known of good images, ``levels`` - A, in [0, ``levels``]."""
        return self.absolute_map if calibrated else levels - self.likelihood_add


class ImageScores(NamedTuple):
    """Of a set's images, without their maps, on the CPU. See ``Scores``."""

    score: Tensor
    """(N,) float32, in [0, 1]."""
    log_score: Tensor
    """(N,) float32, nats."""
    absolute_score: Tensor
    """(N,) float32, nats: comparable between images."""


def score_log_likelihoods(
    logp: Sequence[Tensor], image_size: tuple[int, int], top_k: float = TOP_K, backend: Backend = "auto"
) -> Scores:
    """Scores and maps of log-likelihoods; by Triton not differentiable.

    ``logp``: (B, H_l, W_l) per level, as ``MultiScaleFlow.log_likelihood_maps`` returns them; ``image_size``: (H, W) of
    the maps; ``top_k``: share of the pixels that the image's scores average.
    Errors: InputError where ``top_k`` is not in [0, 1]; see fastmsflow.backend for those of ``backend``.
    """
    log_likelihood, likelihood_add, peak = score_maps(logp, image_size, backend)
    score, log_score = image_scores(log_likelihood, top_k, backend)
    return Scores(score, log_score, likelihood_add, log_likelihood, peak)


def additive_score_map(likelihood_add: Tensor) -> Tensor:
    """``likelihood_add`` A (N, H, W) -> max(A) - A, its maximum over all the images given: their pixels are comparable
    with each other, 0 is the most normal of them (arXiv 2308.15300)."""
    return likelihood_add.max() - likelihood_add


def anomaly_scores(
    z: Sequence[Tensor], image_size: tuple[int, int], top_k: float = TOP_K
) -> tuple[Tensor, Tensor, Tensor]:
    """The published scores: (image_score (B,), score_map_add (B, H, W), score_map_mul (B, H, W)).

    ``z``: latents (B, C_l, H_l, W_l) per level; ``image_size``: (H, W) of the maps; ``top_k``: share of the pixels that
    the image score averages. score_map_mul is for detection, score_map_add for localisation; the latter's maximum is
    taken over the images given, so between two calls it differs by a constant.
    Errors: InputError where ``top_k`` is not in [0, 1].
    """
    scores = score_log_likelihoods(log_likelihood_maps(z), image_size, top_k)
    return scores.score, additive_score_map(scores.likelihood_add), scores.score_map_mul
