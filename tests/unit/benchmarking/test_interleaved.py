"""Contestants of a race take turns, a broken one stops no other, and rows have the times that were taken."""

import gc
import weakref
from itertools import islice, repeat
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import interleaved
from benchmarks.interleaved import Entry, Timing, play_back, race, turns
from benchmarks.parity_gate import Gate

GREEN = Gate({"log-det": 0.0}, 1.0)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interleaved, "PAUSE", 0.0)


def entry(call: Any = lambda x: None, gate: Gate = GREEN) -> Entry:
    return Entry(precision="float32", gate=gate, call=call, inputs=repeat([]))


def test_calls_take_turns_round_by_round() -> None:
    order: list[str] = []
    times = list(islice(turns([lambda name=name: order.append(name) for name in "abc"]), 2))
    assert order == list("abcabc")
    assert [len(taken) for taken in times] == [3, 3]


def test_all_entries_are_ready_before_the_first_is_timed_and_then_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interleaved, "FEWEST", 2)
    order: list[str] = []

    def make(name: str) -> Entry:
        order.append(f"gate of {name}")
        return entry(lambda _: order.append(name))

    results = race({name: lambda name=name: make(name) for name in ("a", "b")}, seconds=0)
    assert order == ["gate of a", "gate of b", "a", "b", "a", "b"]
    assert [len(timing.seconds) for timing in results.values()] == [2, 2]


def test_a_race_ends_after_its_most_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interleaved, "MOST", 7)
    assert len(race({"a": entry}, seconds=1e9)["a"].seconds) == 7


def test_an_entry_that_breaks_at_its_gate_stops_no_other() -> None:
    def broken() -> Entry:
        raise RuntimeError("no compiler")

    results = race({"a": broken, "b": entry}, seconds=0)
    assert str(results["a"]) == "no compiler"
    assert len(results["b"].seconds) == interleaved.FEWEST
    assert isinstance(race({"a": broken})["a"], RuntimeError)


def test_an_entry_whose_gate_is_red_is_timed_and_keeps_its_gate() -> None:
    red = Gate({"log-det": 2.0}, 1.0)
    timing = race({"a": lambda: entry(gate=red)}, seconds=0)["a"]
    assert isinstance(timing, Timing)
    assert not timing.gate.green
    assert timing.seconds


def test_a_race_holds_no_contestant_afterwards() -> None:
    class Contestant:
        def call(self, x: Any) -> None: ...

    held: list[weakref.ref] = []

    def make() -> Entry:
        contestant = Contestant()
        held.append(weakref.ref(contestant))
        return entry(contestant.call)

    results = race({"a": make}, seconds=0)
    gc.collect()
    assert results["a"].seconds
    assert held[0]() is None


def test_a_row_has_the_times_of_the_race(request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> None:
    # pytest-benchmark times nothing under xdist.
    benchmark.disabled = False
    play_back(benchmark, [0.25, 1.0, 0.5])
    assert benchmark.stats.stats.data == [0.25, 1.0, 0.5]
    assert benchmark.stats.stats.median == 0.5
    # These tests show no table of the row.
    request.config._benchmarksession.benchmarks.remove(benchmark.stats)
