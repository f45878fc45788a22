"""Times calls in turns, round by round, so that a busy moment of the machine hits all alike."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, islice
from typing import Any

from torch import Tensor

from benchmarks import suite_settings
from benchmarks.contestants import Contestant
from benchmarks.parity_gate import Gate

# Takes a function that makes a contestant's entry, and times the row of a test.
TimeRow = Callable[[Callable[[Contestant], "Entry"]], None]

PAUSE = 0.05  # seconds
SECONDS = 30.0  # of timing all entries of a race;
FEWEST, MOST = 5, 50  # rounds of it


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A contestant that has passed its gate, or not, with the call that is timed and inputs without end for it."""

    precision: str
    gate: Gate
    call: Callable[[Sequence[Tensor]], object]
    inputs: Iterator[Sequence[Tensor]]

    def run(self) -> None:
        self.call(next(self.inputs))


@dataclass(frozen=True, kw_only=True)
class Timing:
    """An entry's gate and the seconds of each of its rounds."""

    precision: str
    gate: Gate
    seconds: list[float] = field(default_factory=list)


def turns(calls: Sequence[Callable[[], object]]) -> Iterator[list[float]]:
    """Yields the seconds of each call, round after round without end."""
    while True:
        yield [_seconds(call) for call in calls]


def _seconds(call: Callable[[], object]) -> float:
    # The threads of the call before spin for a while, waiting for more.
    time.sleep(PAUSE)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def race(entries: Mapping[str, Callable[[], Entry]], seconds: float = SECONDS) -> dict[str, Timing | Exception]:
    """Makes the entries and times them in turns for about ``seconds``; {name: its timing, or why it was not made}.

    No entry is held afterwards.
    """
    made: dict[str, Entry] = {}
    results: dict[str, Timing | Exception] = {}
    for name, make in entries.items():
        try:
            # Its gate has warmed it up then.
            made[name] = make()
            results[name] = Timing(precision=made[name].precision, gate=made[name].gate)
        except Exception as error:
            results[name] = error
    timings = [results[name] for name in made]
    least, most, start = (1, 1, 0.0) if suite_settings.rehearsing else (FEWEST, MOST, time.perf_counter())
    for done, times in enumerate(islice(turns([entry.run for entry in made.values()]), most if made else 0), 1):
        for timing, taken in zip(timings, times, strict=True):
            timing.seconds.append(taken)
        if done >= least and time.perf_counter() - start >= seconds:
            break
    return results


def play_back(benchmark: Any, seconds: Sequence[float]) -> None:
    """Hands recorded rounds to pytest-benchmark as if it timed them."""
    clock = accumulate(chain.from_iterable((0.0, taken) for taken in seconds))
    benchmark._timer = lambda: next(clock)
    benchmark.pedantic(lambda: None, rounds=len(seconds))
