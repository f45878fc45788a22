"""Results of several runs as a table in Markdown."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import printable
from ..files import written_aside


def write_markdown_table(
    path: Path, header: Sequence[str], rows: Iterable[Sequence[str]], *, title: str, notes: str
) -> None:
    """Writes ``title``, a table, and ``notes`` below it; aside and then renamed."""
    lines = [f"# {title}", "", _line(header), _line(["---"] * len(header)), *map(_line, rows), "", notes]
    with written_aside(path) as aside:
        aside.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8", errors="backslashreplace")


def _line(cells: Sequence[str]) -> str:
    # A name is neither a cell's end nor a line's, nor markup, nor HTML.
    return "| " + " | ".join(re.sub(r"([\\|<\[`*])", r"\\\1", printable(cell)) for cell in cells) + " |"
