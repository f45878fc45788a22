"""Tests that differences between two sets of settings are told in one way."""

import pytest

from fastmsflow.settings_diff import changed_settings

BEFORE = {"lr": 0.1, "model": {"pool": "avg", "size": [32, 32]}, "old": 1}


@pytest.mark.parametrize(
    ("now", "only_now", "text"),
    [
        ({**BEFORE, "model": {"pool": "avg", "size": (32, 32)}}, False, ""),
        ({**BEFORE, "lr": 0.2}, False, "lr was 0.1, is 0.2"),
        ({"lr": 0.1, "model": {"pool": "max", "size": [32, 64]}, "new": 2}, False,
         "model.pool was avg, is max; model.size was [32, 32], is [32, 64]; old was 1, is None; new was None, is 2"),
        ({"lr": 0.1}, True, ""),
        ({"lr": 0.1, "model": {"pool": "max"}}, True, "model.pool was avg, is max"),
    ],
)  # fmt: skip
def test_settings_that_differ_are_named_with_both_values(now: dict, only_now: bool, text: str) -> None:
    assert changed_settings(BEFORE, now, only_now) == text
