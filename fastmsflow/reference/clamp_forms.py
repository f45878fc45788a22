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


CLAMP_FORMS: Mapping[str, SoftClamp] = {
    # FrEIA 0.2 has this form.
    "tanh": SoftClamp(function=lambda raw, clamp: clamp * torch.tanh(raw), kernel_constant=0),
    # FrEIA's git master has this one since 2023-08-17.
    "scaled_tanh": SoftClamp(function=lambda raw, clamp: clamp * torch.tanh(raw / clamp), kernel_constant=1),
    # The fusion flow has this one (arXiv 2308.15300).
    "atan": SoftClamp(function=lambda raw, clamp: ATAN_GAIN * clamp * torch.atan(raw / clamp), kernel_constant=2),
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
