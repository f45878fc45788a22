"""Which tile serves a kernel best on the GPU at hand, and whose convolution is faster there; speed then and now."""

from .kernel_cases import CONDITION, LEVELS, Case, cases, tensors
from .tile_search import Choice, Contest, as_table, operation, save_table, tune

__all__ = [
    "CONDITION",
    "LEVELS",
    "Case",
    "Choice",
    "Contest",
    "as_table",
    "cases",
    "operation",
    "save_table",
    "tensors",
    "tune",
]
