"""Metrics of anomaly detection and localization, on numpy arrays or torch tensors: exact, or in constant memory."""

from .bins import Bins
from .pro import aupro, aupro_published, pro_curve
from .regions import Regions
from .roc import auroc, f1_max
from .streaming import Bounded, PixelHistogram

__all__ = [
    "Bins",
    "Bounded",
    "PixelHistogram",
    "Regions",
    "aupro",
    "aupro_published",
    "auroc",
    "f1_max",
    "pro_curve",
]
