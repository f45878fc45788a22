"""The likelihood of latents under a standard normal."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

from ..backend import Backend, uses_triton
from ..kernels.channels_last import new_rows
from ..reference import likelihood as reference
from . import records_gradients


def log_likelihood_maps(z: Sequence[Tensor], backend: Backend = "auto") -> list[Tensor]:
    """Computes fastmsflow.reference.likelihood.log_likelihood_maps. Differentiable by z."""
    if not uses_triton(backend, z[0]):
        return reference.log_likelihood_maps(z)
    return list(LogLikelihoodMaps.apply(*z)) if records_gradients(*z) else _log_likelihood_maps(list(z))


class LogLikelihoodMaps(torch.autograd.Function):
    """Differentiates ``_log_likelihood_maps``."""

    @staticmethod
    def forward(ctx: Any, *z: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*z)
        return tuple(_log_likelihood_maps(list(z)))

    @staticmethod
    def backward(ctx: Any, *grad_logps: Tensor) -> tuple[Tensor, ...]:
        return tuple(_log_likelihood_maps_backward(list(grad_logps), list(ctx.saved_tensors)))


@library.custom_op("fastmsflow::log_likelihood_maps", mutates_args=())
def _log_likelihood_maps(z: list[Tensor]) -> list[Tensor]:
    from ..kernels import likelihood as kernels

    return kernels.log_likelihood_maps(z)


@_log_likelihood_maps.register_fake
def _(z: list[Tensor]) -> list[Tensor]:
    return [level.new_empty((level.shape[0], *level.shape[2:]), dtype=torch.float32) for level in z]


@library.custom_op("fastmsflow::log_likelihood_maps_backward", mutates_args=())
def _log_likelihood_maps_backward(grad_logps: list[Tensor], z: list[Tensor]) -> list[Tensor]:
    from ..kernels import likelihood as kernels

    return kernels.log_likelihood_maps_backward(grad_logps, z)


@_log_likelihood_maps_backward.register_fake
def _(grad_logps: list[Tensor], z: list[Tensor]) -> list[Tensor]:
    return [new_rows(level, level.shape[1]) for level in z]
