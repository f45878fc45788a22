"""Which tile serves a kernel best on the GPU at hand, and whose convolution is faster there; speed then and now."""

from .cases import LEVELS, Case, cases
from .tuning import Choice, Contest, as_table, save_table, tune

__all__ = ["LEVELS", "Case", "Choice", "Contest", "as_table", "cases", "save_table", "tune"]
