"""Chooses the dtype that a model predicts in, and makes the model ready for it."""

import torch

from ..cpu.features import missing_units
from ..errors import InputError
from ..models.msflow import MSFlow

AUTO = "auto"
"""float16 on a GPU, float32 on a CPU."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes that a model predicts in, by name."""


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turns float32, bfloat16, float16 or auto into a dtype; auto is float16 on a GPU and float32 on a CPU.

    Raises: InputError if ``name`` is none of these, or ``device`` is a CPU without units for that half precision.
    """
    check_dtype(name)
    if name == AUTO:
        return torch.float16 if device.type == "cuda" else torch.float32
    dtype = DTYPES[name]
    lack = missing_units(dtype) if device.type == "cpu" else None
    if lack is not None:
        raise InputError(f"dtype {name}: {lack}; give float32 or {AUTO}")
    return dtype


def check_dtype(name: str) -> None:
    """Raises InputError if ``name`` is no dtype that a model predicts in, on any device."""
    if name != AUTO and name not in DTYPES:
        raise InputError(f"dtype {name}: give {', '.join(DTYPES)} or {AUTO}")


def prepare(model: MSFlow, dtype: str | None = AUTO) -> MSFlow:
    """Returns the copy of ``model`` that scores fastest on its device, in eval mode; see ``MSFlow.for_inference``.

    ``dtype``: see ``resolve_dtype``. The model itself is returned if ``dtype`` is None, or ``for_inference`` has made
    it.

    Raises: InputError if ``resolve_dtype`` does not take ``dtype``.
    """
    if dtype is None or model.made_for_inference:
        return model.eval()
    return model.for_inference(resolve_dtype(dtype, next(model.parameters()).device))
