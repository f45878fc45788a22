"""Packs a submission's maps into the archive that is uploaded."""

import gzip
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from ..files import written_aside

TOP = "submission"
"""The folder in the archive that holds both folders of maps, as archives of the set's own script have one."""
# Values of float16 hardly compress: level 9 takes twice the time of level 1 for as many bytes.
LEVEL = 1


def pack(files: Sequence[Path], base: Path, archive: Path, progress: Callable[[int], None]) -> None:
    """Writes ``files``, which lie below ``base``, and nothing else into ``archive``, a .tar.gz, sorted by name.

    Owners and times are left out, so that equal maps make equal archives. ``progress`` is called with the number of
    files that are packed. Raises: InputError if the archive cannot be written.
    """
    with (
        written_aside(archive) as aside,
        # A tar file that compresses itself tells the time in its first bytes.
        aside.open("wb") as file,
        gzip.GzipFile("", "wb", LEVEL, file, mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w") as tar,
    ):
        for number, path in enumerate(sorted(files), start=1):
            name = str(PurePosixPath(TOP, path.relative_to(base).as_posix()))
            tar.add(path, arcname=name, recursive=False, filter=_anonymous)
            progress(number)


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o644
    return entry
