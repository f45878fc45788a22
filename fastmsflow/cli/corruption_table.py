"""The table of metrics under changes of light."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Column, Table

from ..files import shown
from .output import add_pixel_error, console, format_metric

if TYPE_CHECKING:
    from ..evaluation.corruption import CorruptionResult

# A terminal of 80 columns has room for no more; the files and the report have them all.
SHOWN = (
    "image_auroc",
    "image_auroc_absolute",
    "pixel_auroc",
    "pixel_f1",
    "aupro",
    "false_alarm_rate",
    "recall",
    "f1",
)
WIDE = 98
"""The columns of a terminal that has room for spaces around values."""


def print_corruption(rows: Sequence["CorruptionResult"]) -> None:
    """Prints a table for each class and checkpoint: a line for each change."""
    from ..evaluation.compare_checkpoints import MEAN
    from ..evaluation.corruption import CLEAN
    from ..evaluation.metric_labels import METRIC_LABELS

    for name, checkpoint in dict.fromkeys((row.result.name, row.result.checkpoint) for row in rows):
        some = [row for row in rows if (row.result.name, row.result.checkpoint) == (name, checkpoint)]
        evaluations = [row.result.evaluation for row in some]
        metrics = [metric for metric in SHOWN if any(metric in each.as_shown() for each in evaluations)]
        # A word a line: rich would cut words to make the table narrower.
        heads = (Column(METRIC_LABELS[metric].replace(" ", "\n"), justify="right") for metric in metrics)
        # Without room for spaces rich would cut values.
        spaces = (0, int(console.width >= WIDE))
        table = Table(Column("light"), *heads, title=escape(f"{shown(name)}, {checkpoint}"), padding=spaces)
        add_pixel_error(table, [each.pixel_error for each in evaluations])
        for row, evaluation, following in zip(some, evaluations, [*some[1:], None], strict=True):
            ends = row.change == CLEAN or (following is not None and following.change == MEAN)
            values = (format_metric(getattr(evaluation, metric)) for metric in metrics)
            table.add_row(row.change, *values, end_section=ends)
        console.print(table)
