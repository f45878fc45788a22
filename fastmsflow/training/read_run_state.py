"""Reads the state of an unfinished run, to continue the run by other means than ``train``.

``train(..., resume=True)`` does not use this module, see ``checkpointing.py``.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch

from ..compat.convert import refuse_standardised
from ..compat.official_checkpoint import save_official
from ..errors import InputError
from ..models.checkpoint import ModelDescription, refuse_other_tensors
from ..models.msflow import MultiScaleFlow
from ..readable_file import check_file
from ..recipe import Recipe
from ..schema import read_json_file
from ..state_dicts import number_of_blocks, refuse_other_permutations, refuse_views
from .parameter_groups import parameter_groups
from .run_directory import SETTINGS_FILE
from .state_format import STATE, check_state, refuse_other_shapes


class _Settings(TypedDict):
    """The part of a run's settings that is read."""

    recipe: Recipe
    model: ModelDescription


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
    content, prefix = check_state(Path(path)), "model.flow."
    recipe, config = settings["recipe"], settings["model"]
    state = {key.removeprefix(prefix): t for key, t in content["state_dict"].items() if key.startswith(prefix)}
    refuse_views(path, content["state_dict"].values())
    for level, blocks in enumerate(config["flow"]["blocks"]):
        if number_of_blocks(state, f"parallel_flows.{level}.blocks.") != blocks:
            raise InputError(
                f"{path}: does not hold the {blocks} blocks of level {level} that the run's settings describe"
            )
    try:
        build = partial(MultiScaleFlow.from_config, config)
        refuse_other_tensors("the flow that the run's settings describe", path, build, state)
        refuse_other_permutations(path, state)
        flow = build()
        # As in a run: a fused Adam errs if its state has another memory format than the weights.
        flow.to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(parameter_groups(flow, recipe), lr=recipe.lr)
        flow.load_state_dict(state)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        refuse_other_shapes(str(path), content["optimizer_states"][0], parameters)
        optimizer.load_state_dict(content["optimizer_states"][0])
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


def _settings(path: str | Path) -> _Settings:
    beside = Path(path).parent / SETTINGS_FILE
    check_file(
        path,
        "a run keeps its state until it has finished, and then its weights alone: convert its last.safetensors",
    )
    remedy = (
        "a run's state is read with this file beside it (an official checkpoint has another ending than .ckpt: rename"
        " it)"
    )
    try:
        return read_json_file(beside, _Settings, f"{beside}: damaged", remedy)
    except FileNotFoundError as error:
        raise InputError(f"{beside}: missing; {remedy}") from error
