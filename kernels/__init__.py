"""Triton kernels of the flow's operations, and the functions that launch them.

Each file holds one operation: kernels first, launchers below. Launchers take and return tensors that are logically
(B, C, H, W); in memory the kernels work on rows: one row per pixel, channels contiguous (channels-last).
Arithmetic is in float32 whatever the tensors' dtype. Imports torch and triton, nothing of fastmsflow.
"""
