"""Exports of one model that are about what is done with its graph, not about the graph."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fastmsflow.integrations import export


@contextmanager
def traced_once() -> Iterator[None]:
    """Has all exports in a with block, which must be of one model, use the graphs of the first: they take seconds."""
    trace, to_onnx = export._Predictor.program, torch.onnx.export
    made: dict[object, Any] = {}

    def once(how: Any, *given: Any, **options: Any) -> Any:
        if how not in made:
            made[how] = how(*given, **options)
        return made[how]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export._Predictor, "program", lambda predictor: once(trace, predictor))
        patch.setattr(torch.onnx, "export", lambda program, **options: once(to_onnx, program, **options))
        yield
