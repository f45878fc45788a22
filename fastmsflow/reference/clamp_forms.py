"""The forms of the soft clamp, which bounds a coupling's log-scales: the one place that lists them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import InputError

ClampForm = Literal["tanh", "scaled_tanh", "atan"]

# 0.636 is FrEIA's rounding of 2/pi; trained weights depend on it.
ATAN_GAIN = 0.636


@dataclass(frozen=True, kw_only=True)
class SoftClamp:
    """One form of the soft clamp."""

    function: Callable[[Tensor, float], Tensor]
    """Computes the bounded log-scale from the raw one and the clamp; tensors of any shape, the dtype stays."""
    kernel_constant: int
    """The number by which the Triton kernels know the form: see fastmsflow.kernels.math."""


def _tanh(raw: Tensor, clamp: float) -> Tensor:
    """clamp tanh(raw), as FrEIA 0.2 has it."""
    return clamp * torch.tanh(raw)


def _scaled_tanh(raw: Tensor, clamp: float) -> Tensor:
    """clamp tanh(raw / clamp), as FrEIA's git master has it since 2023-08-17."""
    return clamp * torch.tanh(raw / clamp)


def _atan(raw: Tensor, clamp: float) -> Tensor:
    """0.636 clamp atan(raw / clamp), as the fusion flow has it (arXiv 2308.15300)."""
    return ATAN_GAIN * clamp * torch.atan(raw / clamp)


CLAMP_FORMS: Mapping[str, SoftClamp] = {
    "tanh": SoftClamp(function=_tanh, kernel_constant=0),
    "scaled_tanh": SoftClamp(function=_scaled_tanh, kernel_constant=1),
    "atan": SoftClamp(function=_atan, kernel_constant=2),
}


def find_clamp_form(name: str) -> SoftClamp:
    """Returns the soft clamp of this name.

    Raises: InputError if no form has the name.
    """
    if name not in CLAMP_FORMS:
        raise InputError(f"clamp form {name!r} is not known; choose one of {', '.join(CLAMP_FORMS)}")
    return CLAMP_FORMS[name]


def soft_clamp(raw: Tensor, clamp: float, form: ClampForm) -> Tensor:
    """Bounds log-scales ``raw`` to about +-``clamp``; the result has raw's shape and dtype.

    Raises: InputError if no form has the name ``form``.
    """
    return find_clamp_form(form).function(raw, clamp)
