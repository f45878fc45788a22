"""Metrics of anomaly detection and localisation, on numpy arrays or torch tensors: exact, or in constant memory."""

from .bins import Bins
from .pro import aupro, binned_aupro, pro_curve
from .regions import Regions
from .roc import auroc, f1_max
from .streaming import Bounded, PixelHistogram

__all__ = ["Bins", "Bounded", "PixelHistogram", "Regions", "aupro", "auroc", "binned_aupro", "f1_max", "pro_curve"]
