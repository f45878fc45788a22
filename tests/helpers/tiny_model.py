"""A model that is trained in seconds."""

import torch

from fastmsflow import MSFlow


def tiny_model(**options) -> MSFlow:
    """The same model each time, for 32x32 unless ``options`` say otherwise."""
    torch.manual_seed(0)
    options = {"image_size": (32, 32), "blocks": (1, 1, 1), **options}
    return MSFlow("test_resnet.r160_in1k", pretrained=False, **options)
