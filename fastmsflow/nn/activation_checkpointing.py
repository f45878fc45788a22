"""How training saves memory: activations are computed again in the backward pass, from blocks' inputs or outputs."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch.utils.checkpoint import checkpoint

from .. import backend as backends
from ..backend import Backend

ActivationCheckpointing = Literal["recompute", "invertible"]
"""``recompute``: of each coupling only the input is kept. ``invertible``: of each few blocks of a parallel flow only
the output is, see fastmsflow.nn.invertible; the fusion flow is computed again."""
ACTIVATION_CHECKPOINTING: tuple[ActivationCheckpointing, ...] = get_args(ActivationCheckpointing)
T = TypeVar("T")


def checkpointed(run: Callable[..., T], *args: Any, backend: Backend) -> T:
    """``run(*args, backend)``, of which nothing but ``args`` is kept for the backward pass; that runs it once more."""
    return checkpoint(run, *args, serving(backend), use_reentrant=False, preserve_rng_state=False)


def serving(backend: Backend) -> Backend:
    """The choice that counts now: a backward pass on a GPU runs in a thread of its own, outside of ``backend.use``."""
    return backends.override() or backend


class Autocast(NamedTuple):
    """The autocast of a forward pass, for the backward pass, which has none."""

    device: str
    dtype: torch.dtype
    enabled: bool

    @classmethod
    def here(cls, device: str) -> "Autocast":
        return cls(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    def again(self) -> AbstractContextManager[Any]:
        """A cache would hold weights in half precision beyond their block."""
        return torch.autocast(self.device, self.dtype, self.enabled, cache_enabled=False)
