"""Caches values that are computed from weights alone, until the weights change."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..weight_state import WeightState

T = TypeVar("T")


class CachedValue(NamedTuple):
    """Holds a cached value and the weights from which it was computed."""

    value: object
    weights: Sequence[Tensor]


_invalidations = 0
# A list that gets the values in use; see ``record_used_values``.
_used_values: list[CachedValue] | None = None
# True while cached values go into exported graphs; see ``as_constants``.
_constant = False


def invalidation_count() -> int:
    """Returns how many cached values have been dropped: a CUDA graph that was recorded before is out of date."""
    return _invalidations


@contextmanager
def record_used_values() -> Iterator[list[CachedValue]]:
    """Yields a list of the cached values that are used in the block.

    A CUDA graph recorded there reads them, and has to hold them.
    """
    global _used_values
    before, _used_values = _used_values, []
    try:
        yield _used_values
    finally:
        _used_values = before


@contextmanager
def as_constants() -> Iterator[None]:
    """Puts cached values into graphs that are exported in the block, in place of the work that led to them.

    The weights must not have changed since.
    """
    global _constant
    before, _constant = _constant, True
    try:
        yield
    finally:
        _constant = before


@dataclass(frozen=True)
class _Entry(Generic[T]):
    """Holds a value, the weights it was computed from and their state then."""

    autocast: torch.dtype | bool
    state: WeightState
    weights: tuple[Tensor, ...]
    value: T

    def is_of(self, weights: Sequence[Tensor], autocast: torch.dtype | bool) -> bool:
        """Tells whether the value is still that of these weights."""
        same = len(weights) == len(self.weights) and all(a is b for a, b in zip(weights, self.weights, strict=True))
        return same and self.autocast == autocast and self.state.is_of(weights)


class EmptyInCopies:
    """Is empty in copied and saved models, as a cache should be."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


class WeightCache(EmptyInCopies, Generic[T]):
    """Caches a value that is derived from weights until the weights change.

    The value is computed in every call if gradients are taken, in a compiled graph, and from inference tensors, which
    do not tell of changes. If gradients are taken the cached value is dropped too: an optimizer's fused step, which
    follows, does not tell of changes either. Nor do writes through ``.data``: call ``eval()`` after them.
    """

    def __init__(self) -> None:
        # Threads may share a model, so the entry is read once and replaced as one object.
        self._entry: _Entry[T] | None = None

    def get(self, compute: Callable[[], T], weights: Sequence[Tensor]) -> T:
        """Returns the value of ``compute()``, cached if ``weights`` are the same tensors, unchanged."""
        entry = self._entry
        if _constant and entry is not None and torch.compiler.is_exporting():
            return entry.value
        if torch.compiler.is_compiling() or any(w.is_inference() for w in weights):
            return compute()
        if torch.is_grad_enabled():
            self.clear()
            return compute()
        first = weights[0]
        autocast = torch.is_autocast_enabled(first.device.type) and torch.get_autocast_dtype(first.device.type)
        if entry is None or not entry.is_of(weights, autocast):
            value = compute()
            # Values that are computed while a graph is recorded exist only in replays.
            if first.is_cuda and torch.cuda.is_current_stream_capturing():
                return value
            self.clear()
            self._entry = entry = _Entry(autocast, WeightState(weights), tuple(weights), value)
        if _used_values is not None:
            _used_values.append(CachedValue(entry.value, entry.weights))
        return entry.value

    def clear(self) -> None:
        """Drops the cached value."""
        global _invalidations
        if self._entry is not None:
            _invalidations += 1
        self._entry = None


def wide(cache: WeightCache[list[Tensor]], *weights: Tensor) -> list[Tensor]:
    """Returns ``weights`` in float32 or better, converted once.

    From half precision a kernel would read 2 bytes at a time.
    """
    if all(w.dtype.itemsize >= 4 for w in weights):
        cache.clear()
        return list(weights)
    return cache.get(lambda: [w.float() for w in weights], weights)
