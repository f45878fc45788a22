"""Predicts by OpenVINO on the CPU."""

from collections.abc import Sequence

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

    A model with a tiling computes tiles: ``features`` and ``log_likelihoods``; any other one computes ``scores``.

    Raises: InputError if ``dtype`` is none of these, ``for_inference`` made ``model`` in another dtype than float32, or
    its positional encodings are of the image; UnavailableError if OpenVINO is not installed, or bfloat16 is asked for
    and the chip has none.
    """

    def __init__(self, model: MSFlow, dtype: str = AUTO) -> None:
        check_dtype(dtype)
        precision = PRECISIONS[dtype]
        if precision == "bf16" and "BF16" not in _capabilities():
            raise UnavailableError("dtype bfloat16: this chip has no instructions for it; give float32")
        ready = model if model.made_for_inference else model.for_inference()
        if ready.flow.dtype != torch.float32:
            raise InputError(f"the model is in {ready.flow.dtype}; give the one that it was made from")
        if model.tiling is not None and model.tiling.position == "image":
            raise InputError(
                "the engine openvino computes no positional encodings of a tile's place in its image, which this model"
                " has (--position image); give the engine torch"
            )
        parts = converted(ready.cpu(), Scores._fields if model.tiling is None else None)
        self.dtype = "bfloat16" if precision == "bf16" else "float32"
        self._extractor, self._flow = compiled(parts.extractor), compiled(parts.flow, precision)

    def scores(self, images: Tensor) -> Scores:
        """Computes scores and maps of images (B, 3, H, W) float32 in [0, 1], as ``MSFlow.scores`` does."""
        return Scores(*run(self._flow, run(self._extractor, [images.cpu().contiguous()])))

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def features(self, images: Tensor) -> list[Tensor]:
        """Computes features of images (B, 3, H, W) float32 in [0, 1], as ``MSFlow.features`` does."""
        return run(self._extractor, [images.contiguous()])

    def log_likelihoods(self, features: Sequence[Tensor], offsets: Tensor | None = None) -> list[Tensor]:
        """Computes log-likelihoods of features, as ``MSFlow.log_likelihoods`` does without offsets."""
        if offsets is not None:
            raise ValueError("the graph takes no offsets")
        return run(self._flow, features)


def _capabilities() -> list[str]:
    return cpu_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
