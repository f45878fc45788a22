"""Triton kernels, installed as ``fastmsflow.kernels``. Imports torch and triton, nothing of fastmsflow."""

# The operations of fastmsflow.reference that have a kernel here.
OPERATIONS: frozenset[str] = frozenset()
