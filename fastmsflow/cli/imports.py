"""Imports the large packages that a verb needs, in three quarters of the usual time."""

import gc
from contextlib import suppress
from importlib import import_module


def import_packages(*names: str) -> None:
    """Imports packages that the verb is about to use; one that is missing is left to the import that needs it."""
    # An import makes a million objects that stay, and Python would look through them for garbage again and again.
    gc.disable()
    for name in names:
        with suppress(ImportError):
            import_module(name)
    gc.freeze()
    gc.enable()
