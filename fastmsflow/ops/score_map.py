"""Aggregates the levels' log-likelihood maps at the image's size."""

from collections.abc import Sequence

from torch import Tensor, library

from ..backend import Backend, uses_triton
from ..reference import score_map as reference


def score_maps(
    logp: Sequence[Tensor], image_size: tuple[int, int], backend: Backend = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes fastmsflow.reference.score_map.score_maps. By Triton, not differentiable."""
    if not uses_triton(backend, logp[0]):
        return reference.score_maps(logp, image_size)
    return _score_maps(list(logp), list(image_size))


@library.custom_op("fastmsflow::score_maps", mutates_args=())
def _score_maps(logp: list[Tensor], image_size: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels import score_map as kernels

    return kernels.score_maps(logp, (image_size[0], image_size[1]))


@_score_maps.register_fake
def _(logp: list[Tensor], image_size: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    total, likelihood = (logp[0].new_empty((logp[0].shape[0], *image_size)) for _ in range(2))
    return total, likelihood, logp[0].new_empty(logp[0].shape[0])
