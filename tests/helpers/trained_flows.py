"""Small flows trained for a moment, so that the two formulas of the soft clamp differ in what they compute."""

import functools

import torch
from torch import Tensor

from fastmsflow import MultiScaleFlow
from fastmsflow.reference.clamp_forms import ClampForm

CHANNELS, GRIDS = (16, 24, 40), ((4, 4), (2, 2), (1, 1))


def correlated(images: int, seed: int) -> list[Tensor]:
    """Gaussian features whose channels' second halves follow from the first, so that couplings have much to predict."""
    generator = torch.Generator().manual_seed(seed)
    levels = []
    for c, grid in zip(CHANNELS, GRIDS, strict=True):
        first = torch.randn(images, c // 2, *grid, generator=generator)
        noise = torch.randn(images, c // 2, *grid, generator=generator)
        levels.append(torch.cat([first, 2 * first + 0.5 * noise * first.tanh().exp()], dim=1))
    return levels


@functools.cache
def trained_flow(form: ClampForm) -> MultiScaleFlow:
    """The same flow each time: do not change it."""
    torch.manual_seed(5)
    flow = MultiScaleFlow(CHANNELS, (8, 16, 8), (2, 1, 1), clamp_form=form, backend="torch").train()
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for step in range(40):
        optimizer.zero_grad()
        flow.nll(correlated(8, seed=step)).mean().backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 100.0)
        optimizer.step()
    return flow.eval()
