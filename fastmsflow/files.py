"""Writing files so that nothing is ever half-written: aside first, then renamed."""

import csv
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


ASIDE = ".aside-"


@contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; renames it to ``path`` if the block ends well, else removes it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}{ASIDE}", suffix=path.suffix)
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        # mkstemp makes private files; a result is as readable as any other new file.
        aside.chmod(0o666 & ~_umask())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def remove_asides(folder: Path) -> None:
    """Removes what a killed process was writing aside in ``folder``; nothing else may be writing there."""
    for path in folder.glob(f".*{ASIDE}*"):
        path.unlink()


def write_json(path: str | Path, content: object) -> None:
    """JSON, indented, written aside and renamed."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(content, indent=2, default=str) + "\n")


def write_yaml(path: str | Path, content: Mapping[str, Any]) -> None:
    """YAML in the mapping's order, written aside and renamed. Needs the ``train`` extra."""
    import yaml

    with written_aside(path) as aside:
        aside.write_text(yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True), encoding="utf-8")


def write_table(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """CSV, written aside and renamed; names that are not UTF-8 keep their bytes."""
    with written_aside(path) as aside, aside.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
