"""Chooses the engine that computes a model's scores: PyTorch or OpenVINO."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..models.msflow import MSFlow
from ..scoring import Scores
from . import openvino_engine, precision
from .precision import AUTO

TORCH, OPENVINO = "torch", "openvino"
ENGINES = (TORCH, OPENVINO)


class ReadyModel(NamedTuple):
    """A model that is ready to score."""

    scores: Callable[[Tensor], Scores]
    """Images (B, 3, H, W) float32 in [0, 1] on the CPU -> scores and maps, on any device."""
    dtype: str
    """The name of the dtype of the flow."""


def check_engine(engine: str, dtype: str = AUTO) -> None:
    """Raises InputError if ``engine`` is not one of ENGINES, or does not compute in ``dtype``."""
    if engine not in ENGINES:
        raise InputError(f"engine {engine!r} is not known; give {' or '.join(ENGINES)}")
    (openvino_engine if engine == OPENVINO else precision).check_dtype(dtype)


def ready_model(model: MSFlow, dtype: str, engine: str) -> ReadyModel:
    """Makes ``model`` ready; ``dtype``: see ``resolve_dtype`` and, of OpenVINO, OpenVinoModel.

    Raises: InputError if ``check_engine`` refuses; the errors of OpenVinoModel.
    """
    check_engine(engine, dtype)
    if engine == OPENVINO:
        converted = openvino_engine.OpenVinoModel(model, dtype)
        return ReadyModel(converted.scores, converted.dtype)
    ready = precision.prepare(model, dtype)
    device = next(ready.parameters()).device
    return ReadyModel(
        lambda pixels: ready.scores(pixels.to(device, memory_format=torch.channels_last)),
        str(ready.flow.dtype).removeprefix("torch."),
    )
