"""Keeps the name ``fastmsflow.model`` importable; the models live in ``fastmsflow.models``."""

from .models.msflow import MSFlow, MultiScaleFlow, Prediction

__all__ = ["MSFlow", "MultiScaleFlow", "Prediction"]
