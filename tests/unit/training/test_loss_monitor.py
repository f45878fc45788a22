"""The losses of several processes: kept with a run's state, and what is told of one that is not finite."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from fastmsflow import InputError
from fastmsflow.data.lazy_sequence import LazySequence
from fastmsflow.distributed.process_group import ErrorOnAnotherRank, ProcessGroup
from fastmsflow.training.loss_monitor import LossMonitor, NotFinite

SIZE = 2


def together(work: Callable[[ProcessGroup], Any]) -> list[Any]:
    """Returns what ``work`` returns, or the InputError that it ends with, for each of SIZE processes, which are threads
    here: one waits for the other's word."""
    slots: list[Any] = [None] * SIZE
    all_here = threading.Barrier(SIZE, timeout=20)

    class Threads(ProcessGroup):
        def all_gather(self, own: Any) -> list[Any]:
            slots[self.rank] = own
            all_here.wait()
            everyone = list(slots)
            all_here.wait()
            return everyone

    def one(rank: int) -> Any:
        try:
            return work(Threads(rank, SIZE))
        except InputError as error:
            return error

    with ThreadPoolExecutor(SIZE) as threads:
        return list(threads.map(one, range(SIZE)))


def add(losses: LossMonitor, values: list[float]) -> None:
    for value in values:
        losses.add(torch.tensor(value, dtype=torch.float64), 1.0, [0])
    losses.check(0, ["a.png"])


# Of each process; the sums in another order differ in the last digit.
VALUES = [[0.1, 0.3, 0.7], [0.2, 0.4, 0.6]]


def test_the_mean_of_a_resumed_epoch_is_to_the_bit_that_of_one_that_was_not_interrupted() -> None:
    def whole(world: ProcessGroup) -> float:
        losses = LossMonitor(world, False)
        add(losses, VALUES[world.rank])
        return losses.mean()

    def resumed(world: ProcessGroup) -> float:
        first, second = LossMonitor(world, False), LossMonitor(world, False)
        add(first, VALUES[world.rank][:2])
        second.load(first.state())
        add(second, VALUES[world.rank][2:])
        return second.mean()

    assert together(resumed) == together(whole) == [pytest.approx(2.3 / 6)] * SIZE


def test_a_state_of_another_kind_is_one_line() -> None:
    for state in ({"steps": 2, "total": 0.3}, {"steps": 2, "totals": [0.1, 0.2]}):
        with pytest.raises(InputError, match="another version of fastmsflow; remove it") as caught:
            LossMonitor(ProcessGroup(), False).load(state)
        assert "\n" not in str(caught.value)


def test_the_images_names_are_known_before_the_other_processes_end() -> None:
    """Names are read from shards, which may take longer than a launcher waits once one process has ended."""
    events: list[str] = []

    def work(world: ProcessGroup) -> None:
        class Noted(type(world)):
            def all_gather(self, own: Any) -> Any:
                events.append(f"told by {self.rank}")
                return super().all_gather(own)

        losses = LossMonitor(Noted(*world), False)
        losses.add(torch.tensor(float("nan") if world.rank else 1.0), 1.0, [7])
        losses.check(0, LazySequence(10, lambda number: events.append("looked up") or f"{number}.png"))

    healthy, fault = together(work)
    assert isinstance(healthy, ErrorOnAnotherRank)
    assert isinstance(fault, NotFinite)
    assert fault.record["images"] == ["7.png"]
    assert events.index("looked up") < events.index("told by 1")
