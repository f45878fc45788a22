"""Creates Lightning's loggers by name."""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from ..errors import InputError, UnavailableError

LOGGERS: dict[str, Callable[[Path], Logger]] = {
    "csv": lambda folder: CSVLogger(folder, name="csv"),
    "tensorboard": lambda folder: TensorBoardLogger(folder, name="tensorboard"),
    # Weights & Biases takes its name, project, key and mode from environment variables.
    "wandb": lambda folder: WandbLogger(save_dir=folder),
}


def loggers(names: Sequence[str], out: Path) -> list[Logger]:
    """Returns the loggers of ``names``, which are among LOGGERS; they write into ``out``/logs.

    A resumed run gets csv and tensorboard files of its own.
    """
    return [LOGGERS[name](out / "logs") for name in dict.fromkeys(names)]


def check_loggers(names: Sequence[str]) -> None:
    """Raises: InputError if a name is not among LOGGERS; UnavailableError if a logger's package is not installed."""
    for name in names:
        if name not in LOGGERS:
            raise InputError(f"logger {name!r} is not known; choose of {', '.join(LOGGERS)}")
        if name != "csv" and importlib.util.find_spec(name) is None:
            raise UnavailableError(f"the logger {name} is not installed: pip install {name}")


def close_loggers(names: Sequence[str]) -> None:
    """Ends the loggers' runs: Weights & Biases would log this process's next run into the same one."""
    if "wandb" in names:
        importlib.import_module("wandb").finish()
