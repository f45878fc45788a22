"""Finds the fastest tile of every kernel and the faster convolution on the GPU at hand; compares speed then and now."""

from .launcher_cases import CONDITION, LEVELS, KernelCase, kernel_cases, tensors
from .tile_search import ConvolutionTiming, TileChoice, as_table, operation, save_table, tune

__all__ = [
    "CONDITION",
    "LEVELS",
    "ConvolutionTiming",
    "KernelCase",
    "TileChoice",
    "as_table",
    "kernel_cases",
    "operation",
    "save_table",
    "tensors",
    "tune",
]
