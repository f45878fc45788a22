"""Triton kernels of the flow's operations, and the functions that launch them.

Each file holds one operation: kernels first, launchers below. channels_last, configs, launch, math and permutation hold
what several operations share. Launchers take and return tensors that are logically (B, C, H, W); in memory the kernels
work on rows: one row per pixel, channels contiguous (channels-last). A comment behind a kernel's pointer gives its
shape. Arithmetic is in float32 whatever the tensors' dtype. The package imports torch and triton, and nothing of
fastmsflow.
"""
