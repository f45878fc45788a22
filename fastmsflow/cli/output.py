"""The console, progress bars, tables of metrics, warnings and JSON, as every verb prints them."""

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import typer
from rich.markup import escape
from rich.table import Table

from .. import progress
from ..errors import InputWarning, printable
from ..progress import ProgressBar
from ..terminal import Console

SMALL = 1e-3

console: Console = Console()
# --quiet does not silence it.
errors: Console = Console(stderr=True)
json_console: Console = Console()


def silence(quiet: bool, as_json: bool) -> None:
    """Silences ``console`` for --quiet and --json, and ``print_json`` without --json."""
    console.quiet = quiet or as_json
    json_console.quiet = not as_json


def progress_bar(label: str, total: int | None = None, unit: str | None = None) -> AbstractContextManager[ProgressBar]:
    """Shows a progress bar on ``console`` in a with block."""
    return progress.progress_bar(label, total, console=console, unit=unit)


def print_line(text: str, style: str | None = None, where: Console = console) -> None:
    """Prints ``text`` as it is, on one line however narrow the terminal is."""
    where.print(printable(text), style=style, markup=False, highlight=False, soft_wrap=True)


def print_json(result: object) -> None:
    """Prints ``result`` as JSON on standard output if --json was given."""
    json_console.out(json.dumps(result, indent=2, default=str), highlight=False)


def print_error(label: str, text: str) -> None:
    """Prints a line on standard error, with ``label`` in red before it."""
    errors.print(f"[red]{label}[/red] {escape(printable(text))}", soft_wrap=True, highlight=False)


def exit_if_skipped(faults: list[str]) -> None:
    """Prints a line for each of ``faults``. Raises: typer.Exit with code 1 if there are any."""
    for fault in faults:
        print_error("skipped", fault)
    if faults:
        raise typer.Exit(1)


def format_metric(value: float | None) -> str:
    """Formats a metric for a table; "-" where it is not defined.

    Rates of false pixels are small, and get more digits.
    """
    if value is None:
        return "-"
    return f"{value:.6f}" if 0 < value < SMALL else f"{value:.4f}"


def add_metrics(table: Table, cells: Mapping[str, Iterable[str]]) -> None:
    """Adds a row of ``cells`` for each metric to ``table``, those at a known threshold below a rule."""
    from ..evaluation.metric_labels import METRIC_LABELS
    from ..evaluation.results import RANKING_METRICS

    last_above = max((name for name in cells if name in RANKING_METRICS), key=RANKING_METRICS.index, default=None)
    for name, row in cells.items():
        table.add_row(METRIC_LABELS[name], *row, end_section=name == last_above)


def add_pixel_error(table: Table, pixel_errors: Iterable[float | None]) -> None:
    """Says below ``table`` how exact its pixel metrics are, where there are any."""
    from ..evaluation.results import STATED, exactness

    error = max((error for error in pixel_errors if error is not None), default=None)
    if error is not None:
        table.caption = exactness(error)
        table.caption_style = "yellow" if error > STATED else "dim"


@contextmanager
def warnings_in_yellow() -> Iterator[None]:
    """Prints each InputWarning of the block as one yellow line on standard error."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", InputWarning)
        default_show = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
            if issubclass(category, InputWarning):
                print_line(str(message), "yellow", errors)
            else:
                default_show(message, category, *rest, **named)

        warnings.showwarning = show
        yield
