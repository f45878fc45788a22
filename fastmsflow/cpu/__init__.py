"""Convolutions on a CPU, faster than PyTorch's own.

The backend ``"auto"`` takes them on an x86-64 CPU; ``"torch"`` never does. In inference, 3x3 convolutions of stride 1
in float32 are computed by Winograd's algorithm if they have enough channels, and the others by oneDNN with weights
that are packed once. In training, those that have enough pixels besides are computed by Winograd's algorithm, forward
and for the gradient of their input. Scores differ from those of ``"torch"`` by rounding. A pixel that is NaN or inf
makes NaN of a tile of 4x4, not of its neighbors only.

Transformed filters are four times as large as the weights. FASTMSFLOW_WINOGRAD_MEMORY, or ``set_winograd_memory``,
bounds them.
"""

from .convolution import set_winograd_memory

__all__ = ["set_winograd_memory"]
