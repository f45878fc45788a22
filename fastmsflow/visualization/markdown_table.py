"""Results of several runs as a table in Markdown."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..files import written_aside


def write_markdown_table(
    path: Path, header: Sequence[str], rows: Iterable[Sequence[str]], *, title: str, notes: str
) -> None:
    """Writes ``title``, a table, and ``notes`` below it; aside and then renamed."""
    lines = [f"# {title}", "", _line(header), _line(["---"] * len(header)), *map(_line, rows), "", notes]
    with written_aside(path) as aside:
        aside.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8", errors="backslashreplace")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
