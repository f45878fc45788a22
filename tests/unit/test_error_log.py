"""The file of ``--errors``."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers.error_log import ErrorFile, assert_within, noted_in


def test_comparisons_and_outcomes_of_passed_failed_and_crashed_tests_are_written(tmp_path: Path) -> None:
    path = tmp_path / "errors.json"
    plugin, properties = ErrorFile(path), []
    with noted_in(properties), pytest.raises(AssertionError, match=r"2\.00e-01, not below 1\.00e-01"):
        assert_within([("z", 0.05, 0.1), ("log-det", 0.2, 0.1)])
    for test, when, outcome in (
        *(("a", "setup", "passed"), ("a", "call", "failed"), ("a", "teardown", "passed")),
        *(("b", "setup", "skipped"), ("b", "teardown", "passed"), ("c", "???", "failed")),
    ):
        carried = properties if test == "a" else []
        report = SimpleNamespace(nodeid=test, when=when, outcome=outcome, user_properties=carried)
        plugin.pytest_runtest_logreport(report)
    assert json.loads(path.read_text()) == [
        {"test": "a", "what": "z", "error": 0.05, "bound": 0.1},
        {"test": "a", "what": "log-det", "error": 0.2, "bound": 0.1},
        {"test": "a", "outcome": "failed"},
        {"test": "b", "outcome": "skipped"},
        {"test": "c", "outcome": "failed"},
    ]
