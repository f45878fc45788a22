"""Lists what a command leaves in a folder."""

from pathlib import Path


def names_in(folder: Path) -> set[str]:
    """The names of what is in ``folder``, without lock files: they stay when their claims end."""
    return {path.name for path in folder.iterdir() if not (path.name.startswith(".") and ".lock" in path.name)}
