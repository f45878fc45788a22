"""The learning-rate schedule: the published one, at other lengths, and with a warm-up as a share."""

import pytest
import torch

from fastmsflow.training import Recipe


def test_learning_rate_follows_the_published_schedule() -> None:
    """PyTorch's own schedulers agree: linear warm-up from 0.1 over 12 sub-epochs, x0.33 at 70 and at 90."""
    recipe = Recipe()
    assert not recipe.ends_in_warm_up
    assert (recipe.epochs, recipe.lr, recipe.batch_size, recipe.clip_norm) == (100, 1e-4, 8, 2.0)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=recipe.lr)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=12)
    steps = torch.optim.lr_scheduler.MultiStepLR(optimizer, [70, 90], gamma=0.33)
    for sub_epoch in range(recipe.epochs):
        assert recipe.lr * recipe.lr_factor(sub_epoch) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        warm.step()
        steps.step()


@pytest.mark.parametrize("meta_epochs", [25, 10, 2])
def test_the_warm_up_is_12_sub_epochs_however_short_the_run(meta_epochs: int) -> None:
    recipe = Recipe(meta_epochs=meta_epochs)
    rate, factors, count = 0.1, [], 4 * meta_epochs
    for sub_epoch in range(count):
        if sub_epoch <= 12:
            rate = 0.1 + 0.9 * sub_epoch / 12
        elif sub_epoch in (0.7 * count, 0.9 * count):
            rate *= 0.33
        factors.append(rate)
    assert [recipe.lr_factor(sub_epoch) for sub_epoch in range(recipe.epochs)] == pytest.approx(factors)


def test_a_share_of_the_sub_epochs_keeps_the_warm_ups_shape() -> None:
    recipe = Recipe(meta_epochs=10, warm_up_share=0.12)
    factors = [recipe.lr_factor(epoch) for epoch in range(recipe.epochs)]
    assert factors[:6] == pytest.approx([0.1, 0.28, 0.46, 0.64, 0.82, 1.0])
    assert factors[27:29] == pytest.approx([1.0, 0.33])
    assert factors[35:37] == pytest.approx([0.33, 0.33**2])
    published, shared = Recipe(), Recipe(warm_up_share=0.12)
    assert all(shared.lr_factor(epoch) == published.lr_factor(epoch) for epoch in range(100))


@pytest.mark.parametrize(
    ("options", "ends"),
    [
        ({"meta_epochs": 2}, True),
        ({"meta_epochs": 3}, True),  # 12 passes: the 13th would be the first at the full rate
        ({"meta_epochs": 13, "sub_epochs": 1}, False),
        ({"meta_epochs": 2, "warm_up": 8}, True),
        ({"meta_epochs": 2, "warm_up": 7}, False),
        ({"meta_epochs": 1, "sub_epochs": 1, "warm_up": 0}, False),
        ({"meta_epochs": 2, "warm_up_share": 0.12}, False),
        ({"meta_epochs": 2, "warm_up_share": 1.0}, True),
    ],
    ids=str,
)
def test_a_run_that_ends_in_its_warm_up_says_so(options: dict, ends: bool) -> None:
    recipe = Recipe(**options, milestones=())
    assert recipe.ends_in_warm_up is ends
    assert (max(recipe.lr_factor(epoch) for epoch in range(recipe.epochs)) < 1) is ends
