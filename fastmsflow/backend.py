"""Chooses the implementation that computes: ``"auto"``, ``"triton"`` or ``"torch"``.

The innermost ``with fastmsflow.backend.use(...)`` decides; without one the model's own choice; where that is
``"auto"``, the environment variable FASTMSFLOW_BACKEND; else ``"auto"``: Triton for CUDA tensors of a kind the kernels
serve (float16, bfloat16, float32; NVIDIA from compute capability 8.0), plain PyTorch otherwise, on a CPU with faster
convolutions, see fastmsflow.cpu. ``"torch"`` is the plain PyTorch that everything is compared with. A backend asked for
by name that cannot serve raises.

Each thread has its own ``use``. Functions of ``torch.compile`` follow the one that any thread entered or left last, and
are compiled again where it changed.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from .errors import InputError, UnavailableError

__all__ = ["Backend", "use", "uses_triton"]

Backend = Literal["auto", "triton", "torch"]
"""The names that are taken wherever a backend can be chosen."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LOWEST_CAPABILITY = (8, 0)

_faults: dict[torch.device, str | None] = {}
_override: ContextVar[Backend | None] = ContextVar("fastmsflow_backend", default=None)
# The same for compiled functions: Dynamo guards a module's variable, and torch 2.11's cannot trace a ContextVar.
_override_when_compiled: Backend | None = None


def check(name: str) -> Backend:
    """Returns ``name``.

    Raises: InputError if no backend has this name.
    """
    if name not in get_args(Backend):
        raise InputError(f"backend {name!r} is not known; choose one of {', '.join(get_args(Backend))}")
    return cast(Backend, name)


@contextmanager
def use(name: Backend) -> Iterator[None]:
    """Has operations in the block computed by the backend ``name``, whatever the models say.

    Raises: InputError if ``name`` is not a backend's name; UnavailableError, from the operation, if it cannot serve.
    """
    global _override_when_compiled
    token = _override.set(check(name))
    _override_when_compiled = name
    try:
        yield
    finally:
        _override.reset(token)
        _override_when_compiled = _override.get()


def override() -> Backend | None:
    """Returns the backend of the innermost ``use``, or None."""
    return _override_when_compiled if torch.compiler.is_compiling() else _override.get()


def resolve(model_choice: Backend) -> Backend:
    """Returns the backend that is in force in a model whose own choice is ``model_choice``."""
    choice = override() or model_choice
    return check(os.environ.get("FASTMSFLOW_BACKEND", "auto")) if choice == "auto" else choice


def uses_triton(model_choice: Backend, x: Tensor) -> bool:
    """Tells whether the kernels compute an operation on ``x`` now, in a model whose own choice is ``model_choice``.

    Raises: UnavailableError if Triton was asked for and cannot serve; InputError if the tensor's dtype is why.
    """
    choice = resolve(model_choice)
    if choice == "triton":
        if x.dtype not in DTYPES:
            raise InputError(
                f"backend 'triton' computes float16, bfloat16 and float32, not {x.dtype}; use 'torch' for it"
            )
        if (fault := _triton_fault(x.device)) is not None:
            raise UnavailableError(f"backend 'triton': {fault}")
        return True
    return choice == "auto" and x.is_cuda and x.dtype in DTYPES and _triton_fault(x.device) is None


def _triton_fault(device: torch.device) -> str | None:
    """Returns why the kernels cannot run on ``device`` and what to do about it, or None if they can."""
    # Not functools.cache: torch.compile looks through that and warns.
    if device not in _faults:
        _faults[device] = _find_triton_fault(device)
    return _faults[device]


# A device stays what it is, so compiled functions ask once and trace nothing. This is all that
# torch.compiler.assume_constant_result does besides importing torch._dynamo, which takes a second.
_triton_fault._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _find_triton_fault(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton, or use 'torch'"
    try:
        from .kernels import configs, launch  # noqa: F401 - reports a damaged table before an operation does
    except ValueError as error:
        raise InputError(str(error)) from error
    if launch.INTERPRETED:
        return None
    if device.type != "cuda":
        return (
            f"a {device.type} tensor was given, and the kernels run on GPUs; use 'torch', or set TRITON_INTERPRET=1"
            " before the import to run them in Triton's interpreter"
        )
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < LOWEST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} is older than the kernels serve (compute capability 8.0); use 'torch'"
    return None
