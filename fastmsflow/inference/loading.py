"""Loads a model onto the device and in the memory format where it computes fastest."""

from pathlib import Path

import torch

from ..models.msflow import MSFlow


def load_model(path: str | Path) -> MSFlow:
    """Loads a checkpoint for inference on the GPU, if there is one."""
    return to_fastest_device(MSFlow.load(path))


def to_fastest_device(model: MSFlow) -> MSFlow:
    """Moves ``model`` to the GPU, if there is one, in channels-last format, and returns it."""
    model = model.to(memory_format=torch.channels_last)
    return model.cuda() if torch.cuda.is_available() else model
