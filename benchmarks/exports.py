"""Writes the ONNX files that the runtimes read: of the whole model, as ``fastmsflow export`` does, and of its flow."""

import copy
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

from fastmsflow import MSFlow, MultiScaleFlow, backend
from fastmsflow.integrations.export import export_onnx
from fastmsflow.nn.weight_cache import as_constants

LEVELS = 3
TRACED_BATCH = 2


class Exports:
    """The files of a model, each written into ``folder`` when it is first asked for."""

    def __init__(self, model: MSFlow, grids: Sequence[tuple[int, int]], folder: Path) -> None:
        self._model, self._grids, self._folder = model, grids, folder

    @cached_property
    def model(self) -> Path:
        """Images -> the fields of ``MSFlow.predict``."""
        return export_onnx(self._model, self._folder / "model.onnx").path

    @cached_property
    def flow(self) -> Path:
        """Pooled features -> log-likelihood map per level, log_det (B,)."""
        path = self._folder / "flow.onnx"
        flow = _Likelihoods(copy.deepcopy(self._model.flow).requires_grad_(False)).eval()
        shapes = zip(self._model.flow.channels, self._grids, strict=True)
        features = tuple(torch.zeros(TRACED_BATCH, channels, *grid) for channels, grid in shapes)
        batch = (({0: Dim("batch")},) * LEVELS,)
        with torch.no_grad(), backend.use("torch"):
            # Fills the caches of values derived from weights, which become constants of the graph.
            flow(*features)
            with as_constants():
                program = torch.export.export(flow, features, dynamic_shapes=batch)
            torch.onnx.export(program, dynamo=True, verbose=False).save(path)
        return path


class _Likelihoods(nn.Module):
    def __init__(self, flow: MultiScaleFlow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, *features: Tensor) -> tuple[Tensor, ...]:
        maps, log_det = self.flow.log_likelihood_maps(features)
        return (*maps, log_det)
