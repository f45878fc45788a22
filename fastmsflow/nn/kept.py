"""What is computed from weights alone, once for given weights."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Kept(Generic[T]):
    """Computes a value again only where a tensor that it was computed from has changed.

    Where gradients are taken, in a compiled graph and on inference tensors, which tell of no change, it is computed
    each time.
    """

    def __init__(self) -> None:
        self._key: tuple[object, ...] | None = None
        self._sources: tuple[Tensor, ...] = ()
        self._value: T | None = None

    def get(self, compute: Callable[[], T], sources: Sequence[Tensor]) -> T:
        first = sources[0]
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or any(s.is_inference() for s in sources):
            return compute()
        autocast = torch.is_autocast_enabled(first.device.type) and torch.get_autocast_dtype(first.device.type)
        # In-place updates move _version; moves to a device or dtype move data_ptr.
        key = (autocast, *((s._version, s.data_ptr(), s.dtype) for s in sources))
        # The sources are held, so that no new tensor can lie where one of them lay.
        same = len(sources) == len(self._sources) and all(a is b for a, b in zip(sources, self._sources, strict=True))
        if self._key != key or not same or self._value is None:
            self._key, self._sources, self._value = key, tuple(sources), compute()
        return self._value

    def clear(self) -> None:
        self._key, self._sources, self._value = None, (), None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copied or saved model begins anew."""
        return type(self), ()
