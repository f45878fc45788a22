"""The dtype in which sums are taken."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns float32 for the half precisions, the dtype itself for float32 and float64."""
    return torch.promote_types(dtype, torch.float32)
