"""Imports the large packages that a verb needs, in three quarters of the usual time."""

import gc
import sys
from contextlib import suppress
from importlib import import_module


def import_packages(*names: str) -> None:
    """Imports packages that the verb is about to use; one that is missing is left to the import that needs it."""
    new = [name for name in names if name not in sys.modules]
    if not new or not gc.isenabled():
        return
    # An import makes a million objects that stay, and Python would look through them for garbage again and again.
    gc.disable()
    try:
        for name in new:
            with suppress(ImportError):
                import_module(name)
    finally:
        gc.freeze()
        gc.enable()
