"""Weights that are about to be read are not filled at random first."""

import torch
from timm.layers import trunc_normal_
from torch import nn

from fastmsflow.nn.no_initialization import NoInitialization


def test_modules_stay_as_they_were_allocated_within_the_block_alone(poisoned: None) -> None:
    with NoInitialization():
        empty = [nn.Conv2d(2, 3, 3), nn.Linear(2, 3), nn.Embedding(2, 3)]
        weight = nn.init.kaiming_normal_(torch.empty(2, 3))
        assert trunc_normal_(weight) is weight
    assert all(parameter.isnan().all() for module in empty for parameter in module.parameters())
    assert weight.isnan().all()
    assert not any(parameter.isnan().any() for parameter in nn.Conv2d(2, 3, 3).parameters())


def test_what_is_computed_is_computed() -> None:
    x = torch.rand(2, 3)
    expected = torch.sin(x) + 1
    with NoInitialization():
        assert torch.equal(x.sin().add_(1), expected)
        assert nn.init.zeros_(tensor=x) is x
        assert nn.init.constant_(x, 3.0).eq(3).all()
