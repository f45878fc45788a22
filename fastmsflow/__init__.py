"""fastmsflow: MSFlow anomaly detection, made fast.

Multi-scale normalizing flows (arXiv 2308.15300) find and locate defects in images after seeing only good ones.
Everything public is imported when it is first used, so that ``import fastmsflow`` costs what ``import torch`` does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from . import backend, compat, data, metrics, scoring
    from .errors import InputError, UnavailableError
    from .integrations.scikit_learn import MSFlowDetector
    from .models.msflow import MSFlow, MultiScaleFlow, Prediction

_HOMES = {
    "InputError": "errors",
    "UnavailableError": "errors",
    "MSFlow": "model",
    "MSFlowDetector": "integrations.scikit_learn",
    "MultiScaleFlow": "model",
    "Prediction": "model",
}
_MODULES = ("backend", "compat", "data", "metrics", "scoring")

__all__ = [
    "InputError",
    "MSFlow",
    "MSFlowDetector",
    "MultiScaleFlow",
    "Prediction",
    "UnavailableError",
    "__version__",
    "backend",
    "compat",
    "data",
    "metrics",
    "scoring",
]


# To a type checker it would say that there is every name.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            return getattr(import_module(f".{_HOMES[name]}", __name__), name)
        if name in _MODULES:
            return import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
