"""Which implementation computes: ``"auto"``, ``"triton"`` or ``"torch"``.

The innermost ``with fastmsflow.backend.use(...)`` decides; without one the model's own choice; where that is
``"auto"``, the environment variable FASTMSFLOW_BACKEND; else ``"auto"``: Triton for CUDA tensors of a kind the kernels
serve, plain PyTorch otherwise. A backend asked for by name that cannot serve raises.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, get_args

from . import kernels
from .errors import InputError, UnavailableError

Backend = Literal["auto", "triton", "torch"]

_override: ContextVar[Backend | None] = ContextVar("fastmsflow_backend", default=None)


def check(name: str) -> Backend:
    """``name`` if it is a backend. Errors: InputError otherwise."""
    if name not in get_args(Backend):
        raise InputError(f"backend {name!r} is not known; choose one of {', '.join(get_args(Backend))}")
    return name  # type: ignore[return-value]


@contextmanager
def use(name: Backend) -> Iterator[None]:
    """Computes with ``name`` inside the block, whatever the models say."""
    token = _override.set(check(name))
    try:
        yield
    finally:
        _override.reset(token)


def resolve(model_choice: Backend = "auto") -> Literal["triton", "torch"]:
    """The backend that computes now. Errors: UnavailableError where Triton was asked for and cannot serve."""
    choice = _override.get() or model_choice
    if choice == "auto":
        choice = check(os.environ.get("FASTMSFLOW_BACKEND", "auto"))
    if choice == "triton" and not kernels.OPERATIONS:
        raise UnavailableError("backend 'triton': this version has no Triton kernels yet; use 'auto' or 'torch'")
    return "torch"
