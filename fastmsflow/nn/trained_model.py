"""Tells the parts of a model that it is built for weights that were trained before."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_TRAINED = ContextVar("a trained model is built", default=False)


@contextmanager
def trained_model() -> Iterator[None]:
    """Has models that are built in the block accept what earlier versions trained, and warn of nothing again."""
    token = _TRAINED.set(True)
    try:
        yield
    finally:
        _TRAINED.reset(token)


def is_trained() -> bool:
    """Tells whether a model is built for weights that were trained before."""
    return _TRAINED.get()
