"""Reads files of tensors so that nothing in them runs, and compares state dicts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, first_few
from .quiet import Kind, QuietThread

# A file of another pickle protocol than torch.save's is checked, or refused, all the same.
_QUIET = QuietThread(Kind("Detected pickle protocol"))


def load_pickled(path: str | Path) -> Any:
    """Loads a file by ``torch.load`` onto the CPU with weights_only=True, so that nothing in the file can run."""
    with _QUIET:
        return torch.load(path, map_location="cpu", weights_only=True)


def refuse_misfit(what: str, path: str | Path, expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Checks that ``given`` has exactly the keys and shapes of ``expected``; nothing is copied.

    Raises: InputError, naming the keys, if it has not. ``what``: what the weights are for, in the message.
    """
    if faults := misfits(expected, given):
        raise InputError(f"{path}: does not fit {what}: {first_few(faults)}")


def misfits(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """Returns the keys that ``given`` lacks or has too much, and those whose shape is not as in ``expected``."""
    return [
        *(f"missing {key}" for key in expected if key not in given),
        *(f"unexpected {key}" for key in given if key not in expected),
        *(
            f"{key} is {tuple(given[key].shape)}, not {tuple(tensor.shape)}"
            for key, tensor in expected.items()
            if key in given and given[key].shape != tensor.shape
        ),
    ]
