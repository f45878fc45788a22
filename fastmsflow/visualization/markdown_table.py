"""Results of several runs as a table in Markdown."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..files import written_aside


def write_markdown_table(
    path: Path, title: str, header: Sequence[str], rows: Iterable[Sequence[str]], notes: str
) -> None:
    """``title``, a table, ``notes`` below it; written aside and renamed."""
    lines = [f"# {title}", "", _line(header), _line(["---"] * len(header)), *map(_line, rows), "", notes]
    with written_aside(path) as aside:
        aside.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8", errors="backslashreplace")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
