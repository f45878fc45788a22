"""Thresholds of pixels from good images alone."""

import json
from bisect import bisect_left

import numpy as np
import pytest

from fastmsflow import InputError
from fastmsflow.calibration import Calibration
from fastmsflow.pixel_calibration import (
    FALSE_PIXELS,
    RATES,
    SHARES,
    PixelThresholds,
    lowest_thresholds,
    shares_above,
    tail_profile,
)
from tests.helpers.tolerances import PIXEL_RATE_STEP


def maps_of(count: int, seed: int = 0, spread: float = 1.0) -> list[np.ndarray]:
    """Maps of several sizes, some much higher than others, with ties."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(20, 90, (count, 2))
    return [
        np.round(generator.gumbel(generator.normal(0, spread), 1, tuple(size)), 2).astype(np.float32) for size in sizes
    ]


def thresholds_of(maps: list[np.ndarray]) -> PixelThresholds:
    return PixelThresholds.from_profiles(np.stack([tail_profile(score_map) for score_map in maps]))


def mean_share(maps: list[np.ndarray], threshold: float) -> float:
    return float(np.mean([np.mean(score_map > threshold) for score_map in maps]))


def brute_force(maps: list[np.ndarray], rate: float) -> float:
    """The lowest value of any map above which the mean share is at most ``rate``."""
    values = np.unique(np.concatenate([score_map.ravel() for score_map in maps]))
    return float(values[bisect_left(values, -rate, key=lambda value: -mean_share(maps, value))])


@pytest.mark.parametrize("count", [1, 2, 12])
def test_a_pixel_threshold_is_the_lowest_that_keeps_the_rate_up_to_a_step_of_the_profiles(count: int) -> None:
    maps = maps_of(count)
    found = thresholds_of(maps)
    for rate, value in zip(RATES, found.values, strict=True):
        assert mean_share(maps, value) <= rate * (1 + 1e-9)
        assert brute_force(maps, rate) <= value <= brute_force(maps, rate / (1 + PIXEL_RATE_STEP))


def test_each_image_counts_the_same_whatever_its_size() -> None:
    small, large = np.zeros((20, 20), np.float32), np.zeros((200, 200), np.float32)
    small.flat[:8], large.flat[:800] = 5, 7  # 2% of each
    found = thresholds_of([small, large])
    assert found.at(0.015, 2).value == 5  # a mean share of 1%, by the large image alone
    assert found.at(0.02, 2).value == 0
    assert found.at(0.005, 2).value == 7


def test_an_image_beyond_the_largest_rate_counts_with_its_own_share() -> None:
    maps = [np.linspace(0, 1, 10_000, dtype=np.float32).reshape(100, 100) for _ in range(9)]
    strange = np.full((100, 100), 9, np.float32)
    strange.flat[:7000] = -1
    found = thresholds_of([*maps, strange])
    # 0.3 of one image of ten is 0.03, and the other images may have 0.03 / 0.9 each.
    assert found.at(0.06, 10).value == pytest.approx(1 - 0.03 / 0.9, abs=0.001)
    assert found.at(0.02, 10).value == 9


def test_a_profile_is_of_constant_size_and_counts_exactly_at_its_values() -> None:
    for size in ((3, 5), (64, 64), (700, 900)):
        score_map = np.random.default_rng(1).normal(size=size).round(2).astype(np.float32)
        profile = tail_profile(score_map)
        assert profile.shape == (2, len(SHARES))
        for value, share in profile.T[::50]:
            assert share == pytest.approx(np.mean(score_map > value), rel=1e-6)


def test_shares_above_are_never_below_the_true_ones_and_at_most_a_step_too_high() -> None:
    maps = maps_of(5)
    at = np.linspace(-2, 8, 23).astype(np.float32)
    found = shares_above(np.stack([tail_profile(score_map) for score_map in maps]), at)
    for score_map, shares in zip(maps, found, strict=True):
        true = np.array([np.mean(score_map > value) for value in at])
        assert (shares >= true * (1 - 1e-6)).all()
        assert (shares <= true * (1 + PIXEL_RATE_STEP) + 1e-6).all()


def test_the_interval_holds_the_rate_of_new_images_about_as_often_as_it_says() -> None:
    """Images whose shares above t are min(1, exp(m - t)), m normal: the true rate of a threshold is known."""
    generator = np.random.default_rng(3)
    trials, images, rate = 60, 40, 0.001
    shares = np.maximum(SHARES, 1e-7)
    population = np.exp(generator.normal(0, 1, 200_000))
    held = too_high = 0
    for _ in range(trials):
        levels = generator.normal(0, 1, images)
        values = levels[:, None] - np.log(shares)
        found = PixelThresholds.from_profiles(np.stack([values, np.broadcast_to(SHARES, values.shape)], 1))
        threshold = found.at(rate, images)
        true = np.minimum(1, population * np.exp(-threshold.value)).mean()
        held += threshold.low <= true <= threshold.high
        too_high += true > threshold.high
    # A bootstrap of skewed shares falls short of 95%, more so for few images.
    assert 0.82 <= held / trials <= 0.99
    assert too_high / trials <= 0.16


def test_the_interval_widens_as_images_get_fewer_and_knows_nothing_of_one() -> None:
    of_many, of_few = (thresholds_of(maps_of(n)).at(0.01, n) for n in (60, 6))
    assert of_many.high / of_many.low < of_few.high / of_few.low
    alone = thresholds_of(maps_of(1)).at(0.01, 1)
    assert (alone.low, alone.high) == (0, 1)
    assert str(alone).endswith("95% interval 0% to 100% by a bootstrap over 1 good image)")


def test_the_text_of_a_pixel_threshold_names_the_unit_of_its_interval() -> None:
    thresholds = PixelThresholds((0.001,), (4.25,), (0.0004,), (0.0021,))
    assert str(thresholds.at(0.001, 47)) == (
        "4.25 nats for 0.1% false pixels (the mean share of a good image's pixels; 95% interval 0.04% to 0.21% by a"
        " bootstrap over 47 good images)"
    )
    assert str(thresholds.at(0.001, 19)).endswith("by a bootstrap over 19 good images, too few: it is too narrow)")


def test_a_rate_between_those_that_are_kept_takes_the_next_lower_one() -> None:
    found = thresholds_of(maps_of(3))
    assert found.at(0.0019, 3) == found.at(0.0015, 3)
    assert found.at(0.0015, 3).false_pixels == 0.0015
    assert found.at(1e-5, 3).false_pixels == 1e-5
    assert found.at(np.float32(0.01), 3).false_pixels == 0.01
    for rate in (0, 9e-6, 0.11, float("nan")):
        with pytest.raises(InputError, match=r"false_pixels is .*; it must be from 0\.00001 to 0\.1"):
            found.at(rate, 3)


def test_pixel_thresholds_survive_json_and_earlier_versions_have_none() -> None:
    pixels = thresholds_of(maps_of(20))
    calibration = Calibration(tuple(range(20)), tuple(range(20)), 0.5, pixels=pixels, false_pixels=0.01)
    again = Calibration.from_dict(json.loads(json.dumps(calibration.as_dict())))
    assert again == calibration
    assert again.has_pixel_threshold
    assert again.pixel_threshold() == pixels.at(0.01, 20)
    assert again.pixel_threshold(FALSE_PIXELS).false_pixels == FALSE_PIXELS

    old = {key: value for key, value in calibration.as_dict().items() if key not in ("pixels", "false_pixels")}
    earlier = Calibration.from_dict(old)
    assert not earlier.has_pixel_threshold
    with pytest.raises(InputError, match=r"an earlier version calibrated this model: `fastmsflow calibrate MODEL"):
        earlier.pixel_threshold()


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"low": (0.0,)}, "not one for each rate; write the checkpoint again"),
        ({"rates": (0.1, 0.01)}, "no falling numbers for rising rates; write the checkpoint again"),
        ({"rates": (-5.0, 0.1)}, "no falling numbers"),
        ({"values": (3.0, 5.0)}, "no falling numbers"),
        ({"values": (float("nan"), 2.0)}, "no falling numbers"),
        ({"values": (1e300, 2.0)}, "no falling numbers"),
        ({"low": (-0.5, 0.0)}, "no falling numbers"),
        ({"high": (1.0, 9.0)}, "no falling numbers"),
    ],
    ids=["lengths", "rates fall", "rate", "values rise", "NaN", "beyond float32", "low", "high"],
)
def test_thresholds_of_a_damaged_checkpoint_are_refused(changed: dict[str, tuple[float, ...]], fault: str) -> None:
    whole = {"rates": (0.01, 0.1), "values": (5.0, 3.0), "low": (0.0, 0.0), "high": (0.1, 1.0)}
    assert PixelThresholds(**whole).at(0.05, 30).value == 5
    with pytest.raises(InputError, match=fault):
        PixelThresholds(**{**whole, **changed})


def test_lowest_thresholds_allow_exactly_the_rate() -> None:
    score_map = np.arange(1000, dtype=np.float32).reshape(20, 50)
    assert lowest_thresholds(tail_profile(score_map)[None], np.array([0.001, 0.01, 0.1])).tolist() == [998, 989, 899]
