"""Reads the state of an unfinished run, to continue the run by other means than ``train``.

``train(..., resume=True)`` does not use this module, see ``checkpointing.py``.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..compat.convert import refuse_standardised
from ..compat.official_checkpoint import read_pickle, save_official
from ..errors import InputError
from ..models.checkpoint import OfficialLayout
from ..models.msflow import MultiScaleFlow
from ..readable_file import check_file
from ..recipe import Recipe
from ..state_dicts import refuse_misfit
from .lightning_module import STATE
from .parameter_groups import parameter_groups
from .run_directory import SETTINGS_FILE


class RunState(NamedTuple):
    """A run at the time when its state was last saved."""

    flow: MultiScaleFlow
    """The weights of the last step (not their moving average), in eval mode on the CPU."""
    optimizer: torch.optim.Adam
    """Adam over the flow's trained parameters, with its state."""
    epoch: int
    """The number of completed meta epochs."""


def load_state(path: str | Path) -> RunState:
    """Reads ``state.ckpt`` of a run's folder, which exists until the run has finished; no code in the file is run.

    ``path``: the file, with the run's ``state-settings.json`` beside it.
    Raises: InputError if either file is missing, damaged, or does not fit the other.
    """
    settings = _settings(path)
    content, prefix = read_pickle(path), "model.flow."
    try:
        recipe = Recipe(**settings["recipe"])
        flow = MultiScaleFlow(**settings["model"]["flow"])
        flow.official_layout = OfficialLayout.from_config(settings["model"])
        # As in a run: a fused Adam errs if its state has another memory format than the weights.
        flow.to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(parameter_groups(flow, recipe), lr=recipe.lr)
        state = {key.removeprefix(prefix): t for key, t in content["state_dict"].items() if key.startswith(prefix)}
        refuse_misfit("the flow that the run's settings describe", path, flow.state_dict(), state)
        flow.load_state_dict(state)
        optimizer.load_state_dict(content["optimizer_states"][0])
        _check_shapes(optimizer)
        sub_epochs = len(content[STATE]["epoch_losses"])
    except InputError as error:
        raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a run's state; give state.ckpt of a run's folder") from error
    return RunState(flow.eval(), optimizer, sub_epochs // recipe.sub_epochs)


def state_to_official(source: str | Path, target: str | Path, fusion_first: bool = False) -> None:
    """Writes the run's state ``source`` as an official checkpoint, from which the published script can resume.

    ``fusion_first``: see ``fastmsflow.compat.save_official``.
    Raises: InputError if the state cannot be read, or ``save_official`` raises one, or the features are standardized,
    which the official format cannot hold.
    """
    flow, optimizer, epoch = load_state(source)
    refuse_standardised(source, _settings(source)["model"])
    try:
        save_official(flow, target, epoch, optimizer, fusion_first)
    except InputError as error:
        raise InputError(f"{source}: {error} (convert the run's last.safetensors, which has none)") from error


def _settings(path: str | Path) -> dict[str, Any]:
    beside = Path(path).parent / SETTINGS_FILE
    check_file(
        path,
        "a run keeps its state until it has finished, and then its weights alone: convert its last.safetensors",
    )
    try:
        return json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{beside}: missing or damaged; a run's state is read with this file beside it (an official checkpoint has"
            " another ending than .ckpt: rename it)"
        ) from error


def _check_shapes(optimizer: torch.optim.Optimizer) -> None:
    """Raises: ValueError if a parameter's state has another shape than the parameter."""
    for parameter, state in optimizer.state.items():
        for value in state.values():
            if isinstance(value, torch.Tensor) and value.ndim and value.shape != parameter.shape:
                raise ValueError(f"a state of {tuple(value.shape)} for a parameter of {tuple(parameter.shape)}")
