"""Scores images with a checkpoint: batches of any engine's table, files by the million."""

from .batch_scorer import BatchScorer
from .precision import AUTO, DTYPES, prepare, resolve_dtype
from .tiled_predictor import TiledPredictor

__all__ = ["AUTO", "DTYPES", "BatchScorer", "TiledPredictor", "prepare", "resolve_dtype"]
