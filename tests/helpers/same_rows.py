"""Rows of results that are compared with BatchScorer's own."""

from collections.abc import Mapping
from typing import Any

import pytest

from tests.helpers.tolerances import OTHER_BATCH


def assert_same_row(row: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Every column of ``row`` is as expected; numbers up to what batches of another size change."""
    for name, value in row.items():
        same = pytest.approx(expected[name], rel=OTHER_BATCH) if isinstance(value, float) else expected[name]
        assert value == same, name
