"""Tests where cached features lie, how they get to a GPU (with stand-ins for it), and when keeping them pays off."""

from contextlib import contextmanager

import pytest
import torch

from fastmsflow.distributed.process_group import ProcessGroup
from fastmsflow.training import features_on_disk as cached_module
from fastmsflow.training.cache_break_even import BreakEven
from fastmsflow.training.features_on_disk import placement
from fastmsflow.training.loaders import FeatureLoader
from fastmsflow.training.samplers import SequentialBatchSampler


def test_features_go_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * gib, 80 * gib))
    monkeypatch.setattr(cached_module, "available_memory", lambda: 100 * gib)
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert placement(30 * gib, gpu) == "on the GPU"
    assert placement(30 * gib + 1, gpu) == "in memory"
    assert placement(50 * gib, gpu) == placement(1, cpu) == "in memory"
    assert placement(50 * gib + 1, gpu) == placement(50 * gib + 1, cpu) == "on disk"
    # Each of two processes holds as much in memory, but on a GPU of its own.
    assert placement(25 * gib, cpu, 2) == "in memory"
    assert placement(25 * gib + 1, cpu, 2) == "on disk"
    assert placement(30 * gib, gpu, 8) == "on the GPU"


def test_the_next_batch_is_fetched_on_a_stream_of_its_own_before_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple] = []

    class Stream:
        def __init__(self, name: str = "aside") -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            events.append((self.name, "waits for", other.name))

    class Level:
        def __init__(self, number: int) -> None:
            self.number = number

        def record_stream(self, stream: Stream) -> None:
            events.append(("keep", self.number, stream.name))

    def fetched(numbers: list[int]) -> list[Level]:
        events.append(("fetch", numbers[0]))
        return [Level(numbers[0])]

    @contextmanager
    def entered(stream: Stream):
        events.append(("enter", stream.name))
        yield
        events.append(("leave", stream.name))

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("main"))
    loader = FeatureLoader(fetched, SequentialBatchSampler(3, 1, ProcessGroup(), split="test"), prefetch=True)
    assert len(loader) == 3
    for _, numbers, *_ in loader:
        events.append(("step", numbers[0]))

    def fetch(i: int) -> list[tuple]:
        return [("enter", "aside"), ("fetch", i), ("leave", "aside")]

    def ready(i: int) -> list[tuple]:
        return [("main", "waits for", "aside"), ("keep", i, "main")]

    nothing = [("enter", "aside"), ("leave", "aside")]
    assert events == [
        ("aside", "waits for", "main"), *fetch(0), *ready(0), *fetch(1), ("step", 0), *ready(1), *fetch(2), ("step", 1),
        *ready(2), *nothing, ("step", 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("extract", "write", "read", "line"),
    [
        (1.4, 0.1, 0.02, "building takes about 12 min; pays off from pass 2"),
        (0.2, 0.1, 0.15, "building takes about 2.4 min; pays off from pass 6"),
        (0.001, 0.001, 0.0, "building takes about 1 s; pays off from pass 2"),
        (30.0, 0.0, 0.0, "building takes about 4.0 h; pays off from pass 1"),
        (0.1, 0.0, 0.1, "building takes about 48 s; never pays off here: the disk is slower than the extractor"),
    ],
)
def test_the_break_even_is_shown(extract: float, write: float, read: float, line: str) -> None:
    shown = str(BreakEven(480, 3_670_016, extract, write, read))
    assert shown == f"cache: 3.5 MiB an image, 1.6 GiB in all; {line}"
