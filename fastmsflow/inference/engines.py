"""Chooses the engine that computes a model's scores: PyTorch or OpenVINO."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..backend import Backend
from ..data.image_views import ScaledImage
from ..errors import InputError
from ..models.msflow import MSFlow
from ..scoring import Scores
from . import openvino_engine, precision
from .precision import AUTO
from .tiled_predictor import TileModel, blended_scores

TORCH, OPENVINO = "torch", "openvino"
ENGINES = (TORCH, OPENVINO)


class ReadyModel(NamedTuple):
    """A model that is ready to score."""

    scores: Callable[[Tensor], Scores]
    """Images (B, 3, H, W) float32 in [0, 1] on the CPU -> scores and maps, on any device."""
    blended: Callable[[Iterable[ScaledImage]], Iterator[Scores]]
    """Images of any size -> scores and maps of each, by the model's tiling."""
    dtype: str
    """The name of the dtype of the flow."""


def check_engine(engine: str, dtype: str = AUTO) -> None:
    """Raises InputError if ``engine`` is not one of ENGINES, or does not compute in ``dtype``."""
    if engine not in ENGINES:
        raise InputError(f"engine {engine!r} is not known; give {' or '.join(ENGINES)}")
    (openvino_engine if engine == OPENVINO else precision).check_dtype(dtype)


def ready_model(model: MSFlow, dtype: str, engine: str, tiles: int) -> ReadyModel:
    """Makes ``model`` ready; ``dtype``: see ``resolve_dtype`` and, of OpenVINO, OpenVinoModel.

    ``tiles``: number of tiles that are computed at once.

    Raises: InputError if ``check_engine`` refuses; the errors of OpenVinoModel.
    """
    check_engine(engine, dtype)
    if engine == OPENVINO:
        converted = openvino_engine.OpenVinoModel(model, dtype)
        return ReadyModel(converted.scores, partial(_blended, model, converted, tiles), converted.dtype)
    ready = precision.prepare(model, dtype)
    device = next(ready.parameters()).device
    return ReadyModel(
        lambda pixels: ready.scores(pixels.to(device, memory_format=torch.channels_last)),
        partial(_blended, model, ready, tiles, backend=model.flow.backend),
        str(ready.flow.dtype).removeprefix("torch."),
    )


def _blended(
    model: MSFlow, ready: TileModel, tiles: int, images: Iterable[ScaledImage], *, backend: Backend = "auto"
) -> Iterator[Scores]:
    """Yields the scores of each image in tiles, which ``ready`` computes."""
    if model.tiling is None:
        raise ValueError("the model has no tiling")
    for (scores,) in blended_scores(images, model.tiling, [ready], batch_size=tiles, backend=backend):
        yield scores
