"""Applies a recipe to the modules of a flow: frozen ones, learning rates, activation checkpointing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

from ..models.msflow import MultiScaleFlow
from ..nn.activation_checkpointing import ActivationCheckpointing
from ..recipe import LEVELS, Recipe


def parameter_groups(flow: MultiScaleFlow, recipe: Recipe) -> list[dict[str, Any]]:
    """Returns the trained parameters for an optimizer: one group, or one for each module if their rates differ."""
    rates = recipe.rates
    trained = {name: module for name, module in _modules(flow).items() if name in rates}
    if not recipe.lr_of:
        return [{"params": [p for module in trained.values() for p in module.parameters()], "lr": recipe.lr}]
    return [{"params": list(module.parameters()), "lr": rates[name], "name": name} for name, module in trained.items()]


@contextmanager
def prepared_for_training(flow: MultiScaleFlow, recipe: Recipe) -> Iterator[None]:
    """Freezes modules and sets activation checkpointing as ``recipe`` says, within the block."""
    requires_grad = [(parameter, parameter.requires_grad) for parameter in flow.parameters()]
    checkpointing = flow.activation_checkpointing
    try:
        for name, module in _modules(flow).items():
            if name not in recipe.rates:
                module.requires_grad_(False)
        flow.activation_checkpointing = cast("ActivationCheckpointing | None", recipe.memory)
        yield
    finally:
        flow.activation_checkpointing = checkpointing
        for parameter, required in requires_grad:
            parameter.requires_grad_(required)


def _modules(flow: MultiScaleFlow) -> dict[str, nn.Module]:
    return dict(zip(LEVELS, flow.parallel_flows, strict=True)) | {"fusion": flow.fusion_flow}
