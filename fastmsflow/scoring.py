"""Anomaly scores and maps from latents. Every score grows with abnormality; sums and maps are float32 or better.

With logp_l = -0.5 mean over channels of z_l^2, and up() the bilinear map to the image's size:
L = sum_l up(logp_l) minus its maximum per image, peak; A = sum_l up(exp(logp_l - its maximum per image)) (arXiv
2308.15300). The published maps, 1 - exp(L) and max(A) - A with the maximum of each image, are relative to the image's
own likeliest pixel. The absolute map -(L + peak) is not: its pixels are comparable between images.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .backend import Backend
from .errors import InputError
from .ops.image_score import image_scores
from .ops.likelihood import log_likelihood_maps
from .ops.score_map import score_maps
from .tiling import TOP_SHARE

__all__ = [
    "MAP_KINDS",
    "TOP_K",
    "ImageScores",
    "MapKind",
    "Prediction",
    "Scores",
    "additive_score_map",
    "anomaly_scores",
    "check_map",
    "score_log_likelihoods",
    "shown_map",
]

MapKind = Literal["absolute", "additive", "multiplicative"]
"""The name of a score map."""
MAP_KINDS: tuple[MapKind, ...] = get_args(MapKind)
"""The score maps: see ``Scores``."""
TOP_K = TOP_SHARE
"""The published share of the pixels, the least likely ones, that an image's scores average."""


def check_map(name: str) -> MapKind:
    """Returns ``name``.

    Raises: InputError if MAP_KINDS does not have it.
    """
    if name not in MAP_KINDS:
        raise InputError(f"map {name!r} is not known; choose one of {', '.join(MAP_KINDS)}")
    return name


def shown_map(calibrated: bool, kind: MapKind | None = None) -> MapKind:
    """Returns the map to show: ``kind``, or if None, the absolute map of a ``calibrated`` model, else the additive.

    Raises: InputError if the absolute map, whose scale is that of good images, has no calibration.
    """
    if kind == "absolute" and not calibrated:
        raise InputError(
            "the absolute map has no scale, since this model is not calibrated: `fastmsflow calibrate MODEL"
            " GOOD_IMAGES` first, or show the additive or the multiplicative map"
        )
    return kind or ("absolute" if calibrated else "additive")


class Scores(NamedTuple):
    """Holds scores and maps of one pass over the latents, float32 or better."""

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

    def to_cpu(self) -> "Scores":
        """Returns a copy in float32 on the CPU."""
        return Scores(*(value.float().cpu() for value in self))

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
    def score_map_add(self) -> Tensor:
        """(B, H, W) max(A) - A, the published map for localization: see ``additive_score_map``."""
        return additive_score_map(self.likelihood_add)

    @property
    def score_map_mul(self) -> Tensor:
        """(B, H, W) 1 - exp(L), in [0, 1], the published map for detection: 0 is the image's likeliest pixel."""
        return 1 - self.log_likelihood.exp()

    def score_map(self, kind: MapKind) -> Tensor:
        """Returns (B, H, W), the map of this kind, large where an image is abnormal.

        Raises: InputError if ``kind`` is not one of MAP_KINDS.
        """
        if check_map(kind) == "absolute":
            return self.absolute_map
        return self.score_map_add if kind == "additive" else self.score_map_mul


class Prediction(NamedTuple):
    """Holds scores and maps of a batch, float32 or better; see the formulas above."""

    score: Tensor
    """(B,) the published image score, in [0, 1]."""
    log_score: Tensor
    """(B,) the same in log space, in nats: does not saturate."""
    score_map_add: Tensor
    """(B, H, W) for localization; 0: the image's most normal pixel. ``Scores.absolute_map`` compares images."""
    score_map_mul: Tensor
    """(B, H, W) for detection, in [0, 1]."""
    absolute_score: Tensor
    """(B,) in nats, not relative to the image itself: comparable between images and days."""


class ImageScores(NamedTuple):
    """Holds the scores of a set's images, without their maps, on the CPU. See ``Scores``."""

    score: Tensor
    """(N,) float32, in [0, 1]."""
    log_score: Tensor
    """(N,) float32, nats."""
    absolute_score: Tensor
    """(N,) float32, nats: comparable between images."""


def score_log_likelihoods(
    logp: Sequence[Tensor], image_size: tuple[int, int], top_k: float = TOP_K, backend: Backend = "auto"
) -> Scores:
    """Computes scores and maps from log-likelihoods; by Triton not differentiable.

    ``logp``: (B, H_l, W_l) per level, as ``MultiScaleFlow.log_likelihood_maps`` returns them; ``image_size``: (H, W) of
    the maps; ``top_k``: share of the pixels that the image's scores average.
    Raises: InputError if the maps or sizes are none or do not fit, or ``top_k`` is not in [0, 1]; see
    fastmsflow.backend for the errors of ``backend``.
    """
    _check(logp, "logp", ("B", "H", "W"), image_size)
    log_likelihood, likelihood_add, peak = score_maps(logp, image_size, backend)
    score, log_score = image_scores(log_likelihood, top_k, backend)
    return Scores(score, log_score, likelihood_add, log_likelihood, peak)


def additive_score_map(likelihood_add: Tensor) -> Tensor:
    """Computes max(A) - A from A (N, H, W), with the maximum of each image by itself (arXiv 2308.15300).

    0 is the most normal pixel of its image, so an image's map does not depend on what else is in the batch, and pixels
    of two images are not comparable; those of ``Scores.absolute_map`` are.
    """
    return likelihood_add.amax(dim=(-2, -1), keepdim=True) - likelihood_add


def anomaly_scores(
    z: Sequence[Tensor], image_size: tuple[int, int], top_k: float = TOP_K
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the published scores: image_score (B,), score_map_add (B, H, W), score_map_mul (B, H, W).

    ``z``: latents (B, C_l, H_l, W_l) per level; ``image_size``: (H, W) of the maps; ``top_k``: share of the pixels that
    the image score averages. score_map_mul is for detection, score_map_add for localization; both are relative to the
    image's own likeliest pixel.
    Raises: InputError if the latents or sizes are none or do not fit, or ``top_k`` is not in [0, 1].
    """
    _check(z, "z", ("B", "C", "H", "W"), image_size)
    scores = score_log_likelihoods(log_likelihood_maps(z), image_size, top_k)
    return scores.score, scores.score_map_add, scores.score_map_mul


def _check(levels: Sequence[Tensor], name: str, shape: tuple[str, ...], image_size: tuple[int, int]) -> None:
    if not isinstance(levels, Sequence) or not levels or not all(isinstance(level, Tensor) for level in levels):
        raise InputError(f"{name} is no sequence of tensors; give a list of ({', '.join(shape)}), one a level")
    shapes = [tuple(level.shape) for level in levels]
    if any(len(sizes) != len(shape) or sizes[0] != shapes[0][0] for sizes in shapes):
        raise InputError(f"{name} has the shapes {shapes}; give ({', '.join(shape)}) per level, with the same B")
    if not torch.compiler.is_compiling() and not all(level.numel() for level in levels):
        raise InputError(f"{name} has the shapes {shapes}; give at least one image")
    if not all(level.is_floating_point() and level.device == levels[0].device for level in levels):
        kinds = ", ".join(f"{level.dtype} on {level.device}" for level in levels)
        raise InputError(f"{name} has levels of {kinds}; give floating ones on one device")
    if not isinstance(image_size, Sequence) or len(image_size) != 2 or min(image_size) < 1:
        raise InputError(f"image_size is {image_size}; give (height, width) in pixels")
