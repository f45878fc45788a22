"""What is computed from weights alone, once for given weights."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# Counts values that were given up: what was recorded with them, a CUDA graph say, is out of date.
_given_up = 0
# Where the values in use are noted; see ``in_use``.
_notebook: list[object] | None = None
# Whether kept values go into exported graphs; see ``as_constants``.
_constant = False


def invalidations() -> int:
    """Grows whenever a kept value is given up."""
    return _given_up


@contextmanager
def in_use() -> Iterator[list[object]]:
    """Yields a list of the kept values, and of their sources, that are used in the block: a graph recorded there reads
    them, and has to hold them."""
    global _notebook
    before, _notebook = _notebook, []
    try:
        yield _notebook
    finally:
        _notebook = before


@contextmanager
def as_constants() -> Iterator[None]:
    """In the block an exported graph holds what was last kept, in place of the work that led to it. The weights must
    not have changed since."""
    global _constant
    before, _constant = _constant, True
    try:
        yield
    finally:
        _constant = before


class WeightCache(Generic[T]):
    """Computes a value again only where a tensor that it was computed from has changed.

    Where gradients are taken, in a compiled graph and on inference tensors, which tell of no change, it is computed
    each time; where gradients are taken, what was kept is given up: an optimizer's fused step, which follows, tells of
    no change either. Nor do writes through ``.data``: call ``eval()`` after them.
    """

    def __init__(self) -> None:
        # Key, sources, value. Threads may share a model, so it is read once and replaced whole.
        self._entry: tuple[tuple[object, ...], tuple[Tensor, ...], T] | None = None

    def get(self, compute: Callable[[], T], sources: Sequence[Tensor]) -> T:
        entry = self._entry
        if _constant and entry is not None and torch.compiler.is_exporting():
            return entry[2]
        if torch.compiler.is_compiling() or any(s.is_inference() for s in sources):
            return compute()
        if torch.is_grad_enabled():
            self.clear()
            return compute()
        first = sources[0]
        autocast = torch.is_autocast_enabled(first.device.type) and torch.get_autocast_dtype(first.device.type)
        # In-place updates move _version; moves to a device or dtype move data_ptr.
        key = (autocast, *((s._version, s.data_ptr(), s.dtype) for s in sources))
        if entry is None or entry[0] != key or not _same(sources, entry[1]):
            value = compute()
            # What a graph under recording computes is not there before its replay.
            if first.is_cuda and torch.cuda.is_current_stream_capturing():
                return value
            self.clear()
            # The sources are held, so that no new tensor can lie where one of them lay.
            self._entry = entry = (key, tuple(sources), value)
        if _notebook is not None:
            _notebook.append((entry[2], entry[1]))
        return entry[2]

    def clear(self) -> None:
        global _given_up
        if self._entry is not None:
            _given_up += 1
        self._entry = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copied or saved model begins anew."""
        return type(self), ()


def wide(kept: WeightCache[list[Tensor]], *weights: Tensor) -> list[Tensor]:
    """``weights`` in float32 or better, converted once: of half precision a kernel would read 2 bytes at a time."""
    if all(w.dtype.itemsize >= 4 for w in weights):
        kept.clear()
        return list(weights)
    return kept.get(lambda: [w.float() for w in weights], weights)


def _same(sources: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(sources) == len(others) and all(a is b for a, b in zip(sources, others, strict=True))
