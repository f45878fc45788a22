"""The learning-rate schedule: the rate rises linearly in the warm-up and drops at each milestone."""

from functools import partial

import torch
from torch.optim.lr_scheduler import LambdaLR

from ..recipe import Recipe


def lr_factor(recipe: Recipe, sub_epoch: int) -> float:
    """Returns the factor of ``recipe.lr`` in ``sub_epoch``, counted from 0."""
    if sub_epoch < recipe.warm_up_epochs:
        return 0.1 + 0.9 * sub_epoch / recipe.warm_up_epochs
    return recipe.decay ** sum(sub_epoch >= round(share * recipe.epochs) for share in recipe.milestones)


def lr_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe) -> LambdaLR:
    """Returns a scheduler that is stepped after each sub-epoch and sets the rate of every parameter group."""
    return LambdaLR(optimizer, partial(lr_factor, recipe))
