"""The learning-rate schedule: the rate rises linearly in the warm-up and drops at each milestone."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..recipe import Recipe


def lr_schedule(optimizer: Optimizer, recipe: Recipe) -> LambdaLR:
    """Returns a scheduler that is stepped after each sub-epoch; it sets every group's rate by ``recipe.lr_factor``."""
    return LambdaLR(optimizer, recipe.lr_factor)
