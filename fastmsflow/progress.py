"""Progress bars on a terminal; nothing is shown elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from .errors import printable


class ProgressBar:
    """One bar, called with the number of items that are done."""

    def __init__(self, progress: Progress, label: str, total: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task(printable(label), total=total)

    def __call__(self, done: int) -> None:
        self._progress.update(self._task, completed=done)

    def stage(self, label: str, total: int | None = None, done: int = 0) -> None:
        """Begins the next stage, with ``done`` of ``total`` items done; None: the total is not known."""
        self._progress.reset(self._task, description=printable(label), total=total, completed=done)


class RateColumn(ProgressColumn):
    """The current number of items per second, as "12.3 images/s"."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f} {self._unit}/s")


def progress(console: Console, unit: str | None = None) -> Progress:
    """Returns bars with the remaining and the elapsed time and, with ``unit``, the items per second."""
    # Labels hold names, so they are no markup.
    label = TextColumn("{task.description}", style="progress.description", markup=False)
    columns = [label, *Progress.get_default_columns()[1:], TimeElapsedColumn()]
    if unit is not None:
        columns.append(RateColumn(unit))
    quiet = console.quiet or not console.is_terminal
    return Progress(*columns, console=console, disable=quiet, transient=True)


@contextmanager
def progress_bar(
    label: str, total: int | None = None, *, console: Console, unit: str | None = None
) -> Iterator[ProgressBar]:
    """Shows one bar in a with block."""
    with progress(console, unit) as bars:
        yield ProgressBar(bars, label, total)
