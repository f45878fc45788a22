"""Exact metrics of anomaly detection and localisation, on numpy arrays or torch tensors."""

from .pro import aupro, binned_aupro, pro_curve
from .roc import auroc

__all__ = ["aupro", "auroc", "binned_aupro", "pro_curve"]
