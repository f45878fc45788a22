"""Heat maps, plots and the report of results. Needs the ``train`` extra."""

from .heat_maps import gallery
from .html_report import Report, ReportRow, write_report
from .plots import plot_scores, plot_training

__all__ = ["Report", "ReportRow", "gallery", "plot_scores", "plot_training", "write_report"]
