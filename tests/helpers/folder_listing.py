"""Lists what a command leaves in a folder."""

from pathlib import Path

from fastmsflow.owned_files import RECORD_FILE


def names_in(folder: Path) -> set[str]:
    """The names of what is in ``folder``, without lock files, which stay when their claims end, and the record."""
    return {path.name for path in folder.iterdir() if not _is_hidden_bookkeeping(path.name)}


def files_in(folder: Path) -> dict[str, bytes]:
    """The names and bytes of the files in ``folder``, without lock files and the record."""
    return {name: (folder / name).read_bytes() for name in names_in(folder) if (folder / name).is_file()}


def _is_hidden_bookkeeping(name: str) -> bool:
    return name == RECORD_FILE or (name.startswith(".") and ".lock" in name)
