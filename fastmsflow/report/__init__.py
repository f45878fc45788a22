"""Pictures of results. Needs the ``train`` extra."""

from .heat_maps import gallery
from .plots import plot_scores, plot_training

__all__ = ["gallery", "plot_scores", "plot_training"]
