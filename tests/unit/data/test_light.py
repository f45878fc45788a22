"""Changes of light: each parameter, tiles of an image, draws, and the fixed changes of a test."""

import math
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmsflow import InputError
from fastmsflow.data.image_views import ImageView, read_view
from fastmsflow.data.light import (
    LIGHT_CORRUPTIONS,
    LIGHT_RANGES,
    LightChange,
    check_augment,
    check_corrupt,
    draw_light,
)
from tests.helpers.paths import ROOT
from tests.helpers.tolerances import LIGHT, LIGHT_STATISTICS

SIZE = (90, 120)
NEUTRAL = LightChange()


def image(low: float = 0.1, high: float = 0.6) -> Tensor:
    return low + (high - low) * torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(0))


def gray(value: float = 0.5) -> Tensor:
    return torch.full((3, *SIZE), value)


def is_close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=LIGHT)


def test_a_neutral_change_returns_the_very_pixels() -> None:
    pixels = image()
    assert NEUTRAL(pixels) is pixels


def test_brightness_multiplies_all_pixels() -> None:
    assert is_close(LightChange(brightness=1.5)(image()), 1.5 * image())


def test_contrast_multiplies_differences_from_the_mean_and_leaves_the_mean() -> None:
    pixels = image(0.4, 0.6)
    weights = torch.tensor([0.2989, 0.587, 0.114])
    mean = (weights[:, None, None] * pixels).sum(dim=0).mean()
    assert is_close(LightChange(contrast=0.5)(pixels), mean + 0.5 * (pixels - mean))


def test_gamma_is_the_exponent() -> None:
    assert is_close(LightChange(gamma=1.7)(image()), image() ** 1.7)


def test_white_balance_multiplies_red_and_blue_alone() -> None:
    factors = torch.tensor([1.2, 1, 0.7])[:, None, None]
    assert is_close(LightChange(red=1.2, blue=0.7)(image()), factors * image())


@pytest.mark.parametrize(
    ("angle", "bright", "dark"),
    [
        (0, (45, -1), (45, 0)),
        (90, (-1, 60), (0, 60)),
        (180, (45, 0), (45, -1)),
        (270, (0, 60), (-1, 60)),
        (45, (-1, -1), (0, 0)),
    ],
)
def test_the_gradient_falls_off_across_the_image_in_its_direction(
    angle: float, bright: tuple[int, int], dark: tuple[int, int]
) -> None:
    changed = LightChange(gradient=0.4, gradient_angle=angle)(gray())[0]
    assert changed[bright].item() == pytest.approx(0.7, abs=LIGHT)
    assert changed[dark].item() == pytest.approx(0.3, abs=LIGHT)
    assert (changed.max().item(), changed.min().item()) == pytest.approx((0.7, 0.3), abs=LIGHT)
    assert changed.mean().item() == pytest.approx(0.5, abs=LIGHT)


def test_tiles_under_a_gradient_are_parts_of_the_image_under_it() -> None:
    change = LightChange(gradient=0.3, gradient_angle=30, brightness=1.1, red=1.1, gamma=0.8)
    whole = change(image())
    for top, left in ((0, 0), (58, 0), (20, 64), (58, 88)):
        tile = change(image()[:, top : top + 32, left : left + 32], corner=(top, left), size=SIZE)
        assert is_close(tile, whole[:, top : top + 32, left : left + 32])


def test_blur_keeps_a_constant_image_and_spreads_a_point_by_its_sigma() -> None:
    assert is_close(LightChange(blur=1.5)(gray()), gray())
    point = torch.zeros(3, 65, 65)
    point[:, 32, 32] = 1
    columns = LightChange(blur=2)(point)[1].sum(dim=0)
    spread = (columns * (torch.arange(65) - 32.0) ** 2).sum().sqrt().item()
    assert spread == pytest.approx(2, rel=LIGHT_STATISTICS)


def test_an_image_of_many_rows_is_blurred_without_a_step() -> None:
    from torchvision.transforms.v2 import functional

    pixels = torch.rand(3, 600, 40, generator=torch.Generator().manual_seed(0))
    assert is_close(LightChange(blur=1.5)(pixels), functional.gaussian_blur(pixels, [11, 11], [1.5, 1.5]))


def test_noise_has_its_sigma_no_mean_and_differs_between_seeds_and_places() -> None:
    def noise(seed: int, corner: tuple[int, int] = (0, 0)) -> Tensor:
        return LightChange(noise=0.03, noise_seed=seed)(gray(), corner=corner, size=(999, 999)) - gray()

    first = noise(1)
    assert first.std().item() == pytest.approx(0.03, rel=LIGHT_STATISTICS)
    assert abs(first.mean().item()) < 0.03 * LIGHT_STATISTICS
    for other in (noise(2), noise(1, (0, 64)), noise(1, (64, 0))):
        correlation = (first * other).mean() / (first.std() * other.std())
        assert abs(correlation.item()) < LIGHT_STATISTICS
    channels = torch.corrcoef(first.flatten(1))
    assert (channels - torch.eye(3)).abs().max().item() < LIGHT_STATISTICS


def test_images_of_a_set_differ_in_their_noise_alone() -> None:
    change = LightChange(noise=0.03, brightness=1.1)
    assert change.for_image(7) == LightChange(noise=0.03, brightness=1.1, noise_seed=7)
    assert not torch.equal(change.for_image(7)(gray()), change.for_image(8)(gray()))


def test_noise_of_a_large_image_does_not_repeat() -> None:
    pixels = torch.full((3, 700, 800), 0.5)
    noise = (LightChange(noise=0.03)(pixels) - pixels).flatten()
    first, second = noise[: 2**19], noise[2**20 : 2**20 + 2**19]
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1].item()) < LIGHT_STATISTICS


@pytest.mark.parametrize("name", LIGHT_CORRUPTIONS)
def test_values_stay_between_black_and_white_and_the_pixels_given_stay(name: str) -> None:
    pixels = image(0, 1)
    changed = LIGHT_CORRUPTIONS[name](pixels)
    assert changed.dtype == torch.float32
    assert 0 <= changed.min().item() < changed.max().item() <= 1
    assert torch.equal(pixels, image(0, 1))


def test_a_change_leaves_the_global_random_state() -> None:
    def draws() -> tuple[float, float]:
        return torch.rand(()).item(), np.random.random()  # noqa: NPY002 - this is the global state

    with torch.random.fork_rng():
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        undisturbed = draws()
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        draw_light(1, 2, 3)(image())
        assert draws() == undisturbed


def test_the_same_key_gives_the_same_pixels_in_another_process(python: Path) -> None:
    code = (
        "import torch; from fastmsflow.data.light import draw_light;"
        "print(draw_light(3, 1, 4)(torch.arange(6144).reshape(3, 32, 64) / 6144).double().sum().item())"
    )
    other = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    here = draw_light(3, 1, 4)(torch.arange(6144).reshape(3, 32, 64) / 6144).double().sum().item()
    assert float(other) == here


def test_the_draw_of_a_key_is_the_same_on_every_machine() -> None:
    drawn = draw_light(0, 1, 2)
    assert (drawn.brightness, drawn.gamma, drawn.noise_seed) == (1.185145364111194, 1.196978987716515, 1577820419)


def test_other_keys_give_other_changes() -> None:
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1)]
    assert len({draw_light(*key) for key in keys}) == len(keys)


def test_draws_fill_their_ranges_and_stay_in_them() -> None:
    draws = [draw_light(0, number) for number in range(300)]
    for name, (low, high) in LIGHT_RANGES.items():
        values = [getattr(drawn, name) for drawn in draws]
        assert low <= min(values) < low + 0.05 * (high - low), name
        assert high - 0.05 * (high - low) < max(values) <= high, name


def test_training_draws_every_parameter_around_no_change() -> None:
    assert set(LIGHT_RANGES) == set(vars(NEUTRAL)) - {"noise_seed"}
    for name, (low, high) in LIGHT_RANGES.items():
        assert low <= getattr(NEUTRAL, name) <= high, name


def test_the_tables_of_the_documentation_are_those_of_the_code() -> None:
    page = (ROOT / "docs/robustness.md").read_text()
    ranges = dict(re.findall(r"^\| `(\w+)` \| ([\d.]+ to [\d.]+) \|", page, re.MULTILINE))
    assert ranges == {name: f"{low:g} to {high:g}" for name, (low, high) in LIGHT_RANGES.items()}
    changes = dict(re.findall(r"^\| ([a-z ]+) \| ([\w., ]*\d) \|$", page, re.MULTILINE))
    assert changes == {
        name: ", ".join(f"{key} {value:g}" for key, value in vars(change).items() if value != vars(NEUTRAL)[key])
        for name, change in LIGHT_CORRUPTIONS.items()
    }


@pytest.mark.parametrize("name", LIGHT_CORRUPTIONS)
def test_a_change_of_the_test_is_none_that_training_draws(name: str) -> None:
    change = vars(LIGHT_CORRUPTIONS[name])
    assert any(not low <= change[parameter] <= high for parameter, (low, high) in LIGHT_RANGES.items())


def test_the_changes_of_the_test_do_what_their_names_say() -> None:
    pixels = image(0.1, 0.9)
    changed = {name: change(pixels) for name, change in LIGHT_CORRUPTIONS.items()}
    before = pixels.mean().item()
    assert changed["darker"].mean() < before < changed["brighter"].mean()
    assert changed["high gamma"].mean() < before < changed["low gamma"].mean()
    assert changed["low contrast"].std() < pixels.std() < changed["noisy"].std()
    assert changed["blurred"].std() < pixels.std()
    warmth = {name: (some[0] - some[2]).mean().item() for name, some in changed.items()}
    assert warmth["cold"] < (pixels[0] - pixels[2]).mean().item() < warmth["warm"]
    left, right = changed["gradient"][:, :, :40].mean(), changed["gradient"][:, :, -40:].mean()
    assert left < before < right


@pytest.mark.parametrize(
    ("name", "value", "range"),
    [
        ("brightness", 0.0, "above 0, below 10"),
        ("gamma", -1.0, "above 0, below 10"),
        ("gradient", 1.5, "from 0 to 1"),
        ("blur", -0.1, "from 0 to 10"),
        ("noise", math.nan, "from 0 to 1"),
    ],
)
def test_a_parameter_out_of_its_range_is_one_line(name: str, value: float, range: str) -> None:
    with pytest.raises(InputError) as raised:
        LightChange(**{name: value})
    assert str(raised.value) == f"{name} is {value}; it must be {range}"


def test_a_name_of_no_light_is_one_line() -> None:
    for check, option in ((check_augment, "augment"), (check_corrupt, "corrupt")):
        assert (check(None), check("light")) == (None, "light")
        with pytest.raises(InputError) as raised:
            check("fog")
        assert str(raised.value) == f"{option} 'fog' is not known; give light, or leave it out"


def test_a_view_is_read_under_its_light() -> None:
    array = np.full((*SIZE, 3), 100, np.uint8)
    plain, changed = (read_view(ImageView(array, light=light), "a", SIZE) for light in (None, LightChange(gamma=2)))
    assert is_close(changed, plain**2)
    one, other = (ImageView(array, light=draw_light(number)).identity for number in (1, 2))
    assert one != other
