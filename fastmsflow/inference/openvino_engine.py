"""Predicts by OpenVINO on the CPU."""

import torch
from torch import Tensor

from ..errors import InputError, UnavailableError
from ..models.msflow import MSFlow
from ..scoring import Scores
from .openvino_graph import compiled, converted, cpu_core, run
from .precision import AUTO

PRECISIONS = {AUTO: "f32", "float32": "f32", "bfloat16": "bf16"}
"""OpenVINO's names of the precisions that it computes in here, by dtype."""


def check_dtype(name: str) -> None:
    """Raises InputError if OpenVINO does not compute in ``name`` here."""
    if name not in PRECISIONS:
        known = [dtype for dtype in PRECISIONS if dtype != AUTO]
        raise InputError(f"dtype {name}: with the engine openvino give {', '.join(known)} or {AUTO}, which is float32")


class OpenVinoModel:
    """Scores images by OpenVINO on the CPU, wherever ``model`` is, in as many threads as torch has.

    ``dtype``: float32, or auto, which is the same; or bfloat16, which the flow is computed in, but not the extractor:
    its features would move, and the scores with them.

    Raises: InputError if ``dtype`` is none of these, or ``for_inference`` made ``model`` in another dtype than float32;
    UnavailableError if OpenVINO is not installed, or bfloat16 is asked for and the chip has none.
    """

    def __init__(self, model: MSFlow, dtype: str = AUTO) -> None:
        check_dtype(dtype)
        precision = PRECISIONS[dtype]
        if precision == "bf16" and "BF16" not in _capabilities():
            raise UnavailableError("dtype bfloat16: this chip has no instructions for it; give float32")
        ready = model if model.made_for_inference else model.for_inference()
        if ready.flow.dtype != torch.float32:
            raise InputError(f"the model is in {ready.flow.dtype}; give the one that it was made from")
        parts = converted(ready.cpu(), Scores._fields)
        self.dtype = "bfloat16" if precision == "bf16" else "float32"
        self._extractor, self._flow = compiled(parts.extractor), compiled(parts.flow, precision)

    def scores(self, images: Tensor) -> Scores:
        """Computes scores and maps of images (B, 3, H, W) float32 in [0, 1], as ``MSFlow.scores`` does."""
        return Scores(*run(self._flow, run(self._extractor, [images.cpu().contiguous()])))


def _capabilities() -> list[str]:
    return cpu_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
