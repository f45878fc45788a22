"""Saves memory in training: the backward pass computes activations again, from blocks' inputs or outputs."""

from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

from torch.utils.checkpoint import checkpoint

from .. import backend as backends
from ..backend import Backend

ActivationCheckpointing = Literal["recompute", "invertible"]
"""``recompute``: only the input of each coupling is stored. ``invertible``: only the output of every few blocks of a
parallel flow is stored, see fastmsflow.nn.invertible; the fusion flow is recomputed."""
ACTIVATION_CHECKPOINTING: tuple[ActivationCheckpointing, ...] = get_args(ActivationCheckpointing)
T = TypeVar("T")


def checkpointed(run: Callable[..., T], *args: Any, backend: Backend) -> T:
    """Returns ``run(*args, backend=...)``; only ``args`` are stored, and the backward pass runs the call once more."""
    return checkpoint(run, *args, backend=current_backend(backend), use_reentrant=False, preserve_rng_state=False)


def current_backend(backend: Backend) -> Backend:
    """Returns the choice that counts now: that of ``backend.use`` if there is one, else ``backend``."""
    # A backward pass on a GPU runs in a thread of its own, outside of ``backend.use``.
    return backends.override() or backend
