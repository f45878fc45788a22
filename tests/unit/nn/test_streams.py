"""The levels' work at the same time, as far as it can be told without a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from fastmsflow.nn.streams import run_on_streams


def test_elsewhere_tasks_run_in_order() -> None:
    done: list[int] = []
    assert run_on_streams([lambda: done.append(0) or "a", lambda: done.append(1) or "b"], torch.device("cpu")) == [
        "a",
        "b",
    ]
    assert done == [0, 1]


def test_in_a_capture_every_task_has_a_stream_forked_from_and_joined_to_the_callers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[tuple] = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.number = sum(event[0] == "new" for event in events)
            events.append(("new", self.number))

        def wait_stream(self, other: "Stream") -> None:
            events.append(("wait", self.number, other.number))

    @contextmanager
    def entered(stream: Stream) -> Iterator[None]:
        events.append(("enter", stream.number))
        yield
        events.append(("leave", stream.number))

    device = torch.device("cuda", 0)
    main = Stream(device)
    for name, value in {
        "is_current_stream_capturing": lambda: True,
        "current_stream": lambda _: main,
        "Stream": Stream,
        "stream": entered,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert run_on_streams([lambda: events.append("a") or 1, lambda: events.append("b") or 2], device) == [1, 2]
    fork = [("wait", 1, 0), ("enter", 1), "a", ("leave", 1), ("wait", 2, 0), ("enter", 2), "b", ("leave", 2)]
    assert events[3:] == [*fork, ("wait", 0, 1), ("wait", 0, 2)]
