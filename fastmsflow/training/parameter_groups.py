"""The flow's parts while a recipe trains it: which are frozen, at what rate each learns, how memory is saved."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

from ..models.msflow import MultiScaleFlow
from ..nn.activation_checkpointing import ActivationCheckpointing
from ..recipe import LEVELS, Recipe


def parameter_groups(flow: MultiScaleFlow, recipe: Recipe) -> list[dict[str, Any]]:
    """For an optimizer: the parameters that are trained, in one group, or one a part where parts' rates differ."""
    rates = recipe.rates
    learning = {part: module for part, module in _parts(flow).items() if part in rates}
    if not recipe.lr_of:
        return [{"params": [p for module in learning.values() for p in module.parameters()], "lr": recipe.lr}]
    return [{"params": list(module.parameters()), "lr": rates[part], "name": part} for part, module in learning.items()]


def trained_parameters(flow: MultiScaleFlow) -> list[nn.Parameter]:
    """Those that are not frozen."""
    return [parameter for parameter in flow.parameters() if parameter.requires_grad]


@contextmanager
def prepared(flow: MultiScaleFlow, recipe: Recipe) -> Iterator[None]:
    """In the block ``recipe``'s frozen parts take no gradient and memory is saved as it says; then all is as before."""
    before = [(parameter, parameter.requires_grad) for parameter in flow.parameters()], flow.memory
    try:
        for part, module in _parts(flow).items():
            if part not in recipe.rates:
                module.requires_grad_(False)
        flow.memory = cast("ActivationCheckpointing | None", recipe.memory)
        yield
    finally:
        flow.memory = before[1]
        for parameter, required in before[0]:
            parameter.requires_grad_(required)


def _parts(flow: MultiScaleFlow) -> dict[str, nn.Module]:
    return dict(zip(LEVELS, flow.parallel_flows, strict=True)) | {"fusion": flow.fusion_flow}
