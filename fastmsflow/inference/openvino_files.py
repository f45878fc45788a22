"""Writes OpenVINO's format: a model is two files, .xml and, beside it, .bin with the weights."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError, UnavailableError
from ..files import shown, write_faults, written_aside

WEIGHTS = ".bin"
EARLIER = ".earlier"
# More than an .xml takes.
PROBE_BYTES = 2**24


@contextmanager
def ir_written_aside(path: str | Path) -> Iterator[Path]:
    """Yields a path for a new .xml, in a hidden folder; it and its .bin go to ``path`` if the block ends well.

    OpenVINO does not notice weights of another model of the same shapes. So the earlier .xml goes away before the .bin
    is replaced, and the new one comes last: a process that is killed in between leaves no .xml, never a wrong pair.

    Raises: the errors of fastmsflow.files.written_aside; InputError if a .bin without its .xml is in the way.
    """
    path = Path(path)
    weights = path.with_suffix(WEIGHTS)
    for file in (path, weights):
        with write_faults(file):
            if file.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    if os.path.lexists(weights) and not os.path.lexists(path):
        raise InputError(
            f"{shown(weights)}: is in the way, and there is no {shown(path.name)} beside it; move it elsewhere, or"
            " choose another name"
        )
    with written_aside(path) as aside:
        with _disk_faults(aside):
            yield aside
        earlier = aside.with_name(EARLIER)
        if os.path.lexists(path):
            path.replace(earlier)
        try:
            aside.with_suffix(WEIGHTS).replace(weights)
        except BaseException:
            if os.path.lexists(earlier):
                earlier.replace(path)
            raise


@contextmanager
def _disk_faults(aside: Path) -> Iterator[None]:
    """Raises OSError where the block, in which OpenVINO writes ``aside`` and reads it, failed because of the disk.

    OpenVINO does not say why it cannot write, or writes half a file; the next bytes fail for the reason.
    """
    try:
        yield
    except UnavailableError:
        raise
    except RuntimeError:
        with aside.open("ab") as file:
            file.write(bytes(PROBE_BYTES))
        raise
