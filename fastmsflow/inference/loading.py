"""Loads a model, from wherever it lies, onto the device and in the memory format where it computes fastest."""

import shutil
import tempfile
from pathlib import Path

import torch

from ..data.shards.storage import NO_FILE, ShardStorage, open_url
from ..data.url_images import is_there, is_url
from ..errors import InputError, UnavailableError
from ..files import shown
from ..models.msflow import MSFlow
from .precision import AUTO


def parse_device(name: str) -> torch.device | None:
    """Turns cpu, cuda or cuda:N into a device, and auto into None. Raises: InputError if ``name`` is none of these."""
    if name == AUTO:
        return None
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is not known; give auto, cpu, cuda or cuda:N")
    return device


def to_device(model: MSFlow, device: torch.device | None = None) -> MSFlow:
    """Moves ``model`` to ``device`` in channels-last format, and returns it; None: the GPU, if there is one.

    Raises: InputError if this process does not see that GPU.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    elif device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {device}: this process sees {torch.cuda.device_count()} GPUs; give auto or cpu")
    return model.to(device).to(memory_format=torch.channels_last)


def load_model(path: str | Path) -> MSFlow:
    """Loads a checkpoint for inference on the GPU, if there is one."""
    return to_device(MSFlow.load(path))


def read_model(model: str) -> MSFlow:
    """Reads the checkpoint at a path or a URL, or the folder that ``save_pretrained`` wrote.

    Raises: InputError if there is none or it cannot be read; UnavailableError if a package is missing.
    """
    if not is_url(model):
        return MSFlow.from_pretrained(model) if Path(model).is_dir() else MSFlow.load(model)
    if not is_there(model):
        raise InputError(f"{shown(model)}: {NO_FILE}; give the URL of a fastmsflow checkpoint (.safetensors)")
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "model.safetensors"
        try:
            with open_url(model) as there, local.open("wb") as here:
                shutil.copyfileobj(there, here)
        except Exception as error:  # each kind of storage has errors of its own
            raise InputError(f"{shown(model)}: {ShardStorage.why(error)}") from error
        try:
            return MSFlow.load(local)
        except (InputError, UnavailableError) as error:
            raise type(error)(str(error).replace(str(local), shown(model))) from error
