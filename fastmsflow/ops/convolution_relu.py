"""The convolution, addition and ReLU as one operator of cuDNN's, for the frozen extractor.

cuDNN has it, so there is no Triton kernel of this name.
"""

from typing import Any

import torch
from torch import Tensor, library

from ..backend import Backend, uses_triton
from ..reference import convolution_relu as reference
from ..reference.convolution_relu import Geometry


def convolution_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    *,
    residual: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Computes fastmsflow.reference.convolution_relu.convolution_relu.

    By cuDNN it is not differentiable, since the extractor is frozen; it rounds to x's dtype once, at the end, and its
    ReLU may turn NaN into 0.
    Raises: RuntimeError, from cuDNN, if it has no such operator for these shapes.
    """
    if not uses_cudnn(backend, x):
        return reference.convolution_relu(x, weight, bias, geometry, residual=residual)
    stride, padding, dilation, groups = geometry
    return _convolution_relu(x, weight, bias, residual, list(stride), list(padding), list(dilation), groups)


def uses_cudnn(backend: Backend, x: Tensor) -> bool:
    """Tells whether cuDNN's operators compute on ``x``: if Triton would, on an NVIDIA GPU, and outside autocast.

    Autocast does not know these operators.
    """
    return uses_triton(backend, x) and x.is_cuda and torch.version.hip is None and not torch.is_autocast_enabled("cuda")


@library.custom_op("fastmsflow::convolution_relu", mutates_args=())
def _convolution_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    if not cudnn_may_serve(x):
        geometry = Geometry((stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]), groups)
        return reference.convolution_relu(x, weight, bias, geometry, residual=residual)
    if residual is None:
        return torch.ops.aten.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)
    return torch.ops.aten.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, stride, padding, dilation, groups)


@_convolution_relu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *geometry: Any) -> Tensor:
    *window, groups = geometry
    return torch.ops.aten.convolution(x, weight, bias, *window, False, [0, 0], groups)


def cudnn_may_serve(x: Tensor) -> bool:
    """Tells whether cuDNN is there for ``x``, enabled, and free to take any algorithm.

    Its fused operators do not heed a wish for deterministic ones. What computes asks at each call, since a compiled
    graph does not follow these switches.
    """
    deterministic = torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    return not deterministic and torch.backends.cudnn.is_acceptable(x)
