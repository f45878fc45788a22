"""Metrics in tables."""

import pytest

from fastmsflow.cli.output import format_metric


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0, "0.0000"), (0.95321, "0.9532"), (0.0000494, "0.000049"), (0.00001, "0.000010")],
)
def test_a_metric_has_four_digits_and_a_small_rate_two_more(value: float | None, text: str) -> None:
    assert format_metric(value) == text
