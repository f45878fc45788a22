"""Thresholds from held-out good images."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from fastmsflow import InputError
from fastmsflow.calibration import Calibration, _shortage, needed, threshold


@pytest.mark.parametrize(("rate", "images"), [(0.05, 19), (0.01, 99), (0.1, 9), (0.5, 1), (0.3, 3)])
def test_the_fewest_images_that_a_rate_takes_are_enough_and_one_less_is_not(rate: float, images: int) -> None:
    assert needed(rate) == images
    scores = np.arange(images, dtype=float)
    assert threshold(scores, rate).value == images - 1
    with pytest.raises(InputError, match=rf"needs {images} held-out good images, and there are {images - 1}"):
        threshold(scores[1:], rate)


def test_the_rate_promised_is_the_rate_reached_on_average() -> None:
    generator = np.random.default_rng(0)
    held_out, new = generator.gumbel(size=(4000, 59)), generator.gumbel(size=(4000, 50))
    reached = [(new[i] > threshold(held_out[i], 0.05).value).mean() for i in range(4000)]
    assert np.mean(reached) == pytest.approx(0.05, abs=3 * np.std(reached) / 4000**0.5)


def test_the_interval_holds_the_true_rate_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    uniform = generator.uniform(size=(4000, 80))
    held = 0
    for scores in uniform:
        found = threshold(scores, 0.1)
        held += found.low <= 1 - found.value <= found.high  # the true rate of a uniform score
    assert binom.cdf(held, 4000, 0.95) == pytest.approx(0.5, abs=0.4999)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200), st.floats(0.005, 0.9))
def test_no_more_of_the_held_out_images_are_above_than_the_rate_allows(scores: list[float], rate: float) -> None:
    if len(scores) < needed(rate):
        return
    found = threshold(scores, rate)
    assert sum(score > found.value for score in scores) <= rate * (len(scores) + 1) - 1 + 1e-6
    assert 0 <= found.low < found.high <= 1
    assert found.value in scores


def test_image_and_region_thresholds_are_of_scores_and_of_peaks_and_survive_json() -> None:
    calibration = Calibration(tuple(range(20)), tuple(range(100, 120)), 50.0, 0.05)
    again = Calibration.from_dict(calibration.as_dict())
    assert again == calibration
    assert again.threshold().value == 19
    assert again.threshold(0.1).value == 18
    assert again.region_threshold().value == 119
    assert "19 nats for 5.00% false alarms (95% interval" in str(again.threshold())


@pytest.mark.parametrize("images", [1, 3, 6, 8, 10, 13, 47, 98])
def test_the_rate_that_a_shortage_allows_is_enough(images: int) -> None:
    allowed = _shortage(images, 0.001).rpartition("allow ")[2]
    assert needed(float(allowed.rstrip("%")) / 100) <= images


def test_doubt_is_rare_where_new_images_are_like_the_held_out_ones_and_comes_where_they_are_not() -> None:
    generator = np.random.default_rng(2)
    held_out, new = generator.normal(size=(2000, 40)), generator.normal(size=(2000, 30))
    found = [threshold(scores, 0.1) for scores in held_out]
    doubts = sum(
        limit.doubt(int((scores > limit.value).sum()), 30) is not None for limit, scores in zip(found, new, strict=True)
    )
    assert binom.sf(doubts - 1, 2000, 0.001) > 1e-4
    assert "30 of 30 good test images" in str(found[0].doubt(30, 30))


@pytest.mark.parametrize("rate", [0, 1, -0.1, float("nan")])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(InputError, match=r"false_alarms is .*; it must be above 0, below 1"):
        threshold([1.0, 2.0], rate)


def test_a_held_out_score_that_is_not_finite_is_refused() -> None:
    with pytest.raises(InputError, match="not finite"):
        Calibration((1.0, float("nan")), (1.0, 2.0), 1.0)
