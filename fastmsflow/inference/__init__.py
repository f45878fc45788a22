"""Scores images with a checkpoint: batches of any engine's table, files by the million."""

from .batch_scorer import BatchScorer
from .precision import AUTO, DTYPES, prepare, resolve_dtype

__all__ = ["AUTO", "DTYPES", "BatchScorer", "prepare", "resolve_dtype"]
