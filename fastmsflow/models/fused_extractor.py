"""Makes the extractor of a model that predicts: fused, and in the dtype that serves the flow's."""

import torch

from ..cpu.features import has_float16_units
from ..nn.feature_extractor import FeatureExtractor


def fuse_extractor(extractor: FeatureExtractor, image_size: tuple[int, int]) -> FeatureExtractor:
    """Fuses the convolutions of ``extractor`` with their batch norms, ReLUs and residuals, and returns it."""
    extractor.fold_batch_norms(image_size)
    extractor.fuse_convolutions(image_size)
    return extractor


def extractor_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Returns the dtype of the extractor that serves a flow of ``dtype``: bfloat16 would move its features."""
    if dtype not in (torch.float16, torch.bfloat16):
        return dtype
    if device.type == "cpu" and (dtype == torch.bfloat16 or not has_float16_units()):
        return torch.float32
    return torch.float16
