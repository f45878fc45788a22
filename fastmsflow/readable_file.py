"""Tells why a file cannot be read, before a library that reads it raises an error of its own."""

import os
import stat
from pathlib import Path

from .errors import InputError
from .files import shown


def check_file(path: str | Path, remedy: str) -> None:
    """Checks that ``path`` is a file that may be read; ``remedy``: the end of the line where it is none.

    Raises: InputError, with the reason: nothing is there, a link leads nowhere, it is a folder or a pipe, or access is
    refused.
    """
    try:
        mode = Path(path).stat().st_mode
    except FileNotFoundError as error:
        fact = "a link to a file that is not there" if Path(path).is_symlink() else "no such file"
        raise InputError(f"{shown(path)}: {fact}; {remedy}") from error
    except (OSError, ValueError) as error:
        # These are too long a name, a file as a folder, links in a circle, a NUL, a folder that may not be looked into.
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{shown(path)}: cannot be looked for ({reason}); {remedy}") from error
    if stat.S_ISDIR(mode):
        raise InputError(f"{shown(path)}: a folder, not a file; {remedy}")
    if not stat.S_ISREG(mode):
        raise InputError(f"{shown(path)}: a pipe or a device, not a file; save it as a file")
    if not os.access(path, os.R_OK):
        raise InputError(f"{shown(path)}: no permission to read it; change its mode")
