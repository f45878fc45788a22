"""Records how far every comparison erred: ``pytest --errors FILE``.

A comparison made by ``assert_within`` is noted with the test that made it. FILE is a JSON list, an entry a line,
written anew after each test: {"test", "what", "error", "bound"} of a comparison, {"test", "outcome"} of a test.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

KEY = "error"
# The running test's properties, which its report carries; under xdist, from the worker to the process that writes.
_properties: list[tuple[str, object]] | None = None


@contextmanager
def noted_in(properties: list[tuple[str, object]]) -> Iterator[None]:
    """Adds what ``note`` is told inside the block to ``properties``."""
    global _properties
    before, _properties = _properties, properties
    try:
        yield
    finally:
        _properties = before


def note(what: str, error: float, bound: float) -> None:
    """Adds a comparison to the running test's report; outside of a test, does nothing."""
    if _properties is not None:
        _properties.append((KEY, {"what": what, "error": error, "bound": bound}))


def assert_within(comparisons: Iterable[tuple[str, float, float]]) -> None:
    """Notes every (what, error, bound), then fails if an error is not below its bound."""
    wrong = {}
    for what, error, bound in comparisons:
        note(what, error, bound)
        if not error < bound:
            wrong[what] = f"{error:.2e}, not below {bound:.2e}"
    assert not wrong, wrong


class ErrorFile:
    """A pytest plugin that writes the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._outcomes: dict[str, str] = {}
        self._lines: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = report.nodeid
        if self._outcomes.get(test, "passed") == "passed":
            self._outcomes[test] = report.outcome
        # A test has three reports, and each carries what was noted before it. If its worker crashed, it has one more.
        if report.when in ("setup", "call"):
            return
        errors = [{"test": test, **error} for key, error in report.user_properties if key == KEY]
        entries = [*errors, {"test": test, "outcome": self._outcomes.pop(test)}]
        self._lines += map(json.dumps, entries)
        aside = self._path.with_name(f"{self._path.name}.part")
        aside.write_text("[\n" + ",\n".join(self._lines) + "\n]\n")
        aside.replace(self._path)
