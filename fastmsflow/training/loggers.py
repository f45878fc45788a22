"""Lightning's loggers by name."""

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from ..errors import InputError, UnavailableError

LOGGERS = ("csv", "tensorboard", "wandb")


def loggers(names: Sequence[str], out: Path) -> list[Logger]:
    """``names``: of LOGGERS. They write into ``out``/logs; of csv and tensorboard each resumed run has its own.

    Errors: InputError for another name, UnavailableError where a logger's package is not installed.
    """
    return [_logger(name, out / "logs") for name in dict.fromkeys(names)]


def check_loggers(names: Sequence[str]) -> None:
    """Errors: as ``loggers``."""
    for name in names:
        if name not in LOGGERS:
            raise InputError(f"logger {name!r} is not known; choose of {', '.join(LOGGERS)}")
        if name != "csv" and importlib.util.find_spec(name) is None:
            raise UnavailableError(f"the logger {name} is not installed: pip install {name}")


def close_loggers(names: Sequence[str]) -> None:
    """After a run, if another follows in this process: Weights & Biases would go on in the first one's."""
    if "wandb" in names:
        importlib.import_module("wandb").finish()


def _logger(name: str, folder: Path) -> Logger:
    if name == "csv":
        return CSVLogger(folder, name="csv")
    if name == "tensorboard":
        return TensorBoardLogger(folder, name="tensorboard")
    # Its name and project, keys and modes are taken from its own environment variables.
    return WandbLogger(save_dir=folder)
