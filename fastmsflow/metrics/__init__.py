"""Metrics of anomaly detection and localization, on numpy arrays or torch tensors: exact, or in constant memory."""

from .aupro import aupro, aupro_published, pro_curve
from .auroc import auroc, f1_at, f1_max
from .defect_regions import Regions
from .histogram_bins import Bins
from .pixel_histogram import Bounded, PixelHistogram

__all__ = [
    "Bins",
    "Bounded",
    "PixelHistogram",
    "Regions",
    "aupro",
    "aupro_published",
    "auroc",
    "f1_at",
    "f1_max",
    "pro_curve",
]
