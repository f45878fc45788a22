"""Pictures of results. Needs the ``train`` extra."""

from .heat_maps import gallery
from .html_report import Page, Row, write_page
from .plots import plot_scores, plot_training

__all__ = ["Page", "Row", "gallery", "plot_scores", "plot_training", "write_page"]
