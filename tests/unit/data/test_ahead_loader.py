"""Processes that read ahead: however one of them fails, dies or hangs, the run ends by one line, and soon."""

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from fastmsflow import UnavailableError
from fastmsflow.data import ahead_loader
from fastmsflow.data.image_batches import BatchReader, ImageBatch, read_batches
from fastmsflow.data.reader_pool import ReaderPool
from fastmsflow.errors import in_one_line, is_meant_for_a_person
from tests.helpers.processes import CONTEXT

REMEDY = "give --workers 0"


@contextmanager
def small_shared_memory(size: int) -> Iterator[None]:
    """Allows files of ``size`` bytes alone, and PyTorch's shared memory is files."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def item(size: int = 1) -> dict[str, object]:
    return {"image": torch.zeros(size), "process": os.getpid()}


def end_quietly() -> dict[str, object]:
    os._exit(0)


def end_by(number: int) -> dict[str, object]:
    os.kill(os.getpid(), number)
    return item()


def unreadable() -> None:
    raise ModuleNotFoundError("No module named 'gone'")


class Unreadable:
    """A task that another process cannot unpickle."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return unreadable, ()

    def __call__(self) -> dict[str, object]:
        return item()


class NotPicklable:
    def __reduce__(self) -> str:
        raise OSError(24, "Too many open files")


def not_picklable() -> dict[str, object]:
    return {"image": NotPicklable(), "process": os.getpid()}


def only_line(error: BaseException) -> str:
    assert isinstance(error, Exception) and is_meant_for_a_person(error), repr(error)
    line = in_one_line(error)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("encoded", [False, True])
def test_images_that_shared_memory_does_not_hold_end_a_reading_with_the_remedy(encoded: bool) -> None:
    with small_shared_memory(2**16), ReaderPool(2) as readers, pytest.raises(UnavailableError) as raised:
        list(readers.read([[partial(item, 2**20)]] * 4, encoded))
    line = only_line(raised.value)
    assert "/dev/shm" in line and REMEDY in line


def test_a_batch_to_be_scored_that_shared_memory_does_not_hold_ends_the_run(mvtec: Path) -> None:
    images = [str(path) for path in sorted(mvtec.glob("tile/train/good/*.png"))]
    batches = [ImageBatch(4 * i, images[4 * i : 4 * i + 4]) for i in range(2)]
    with small_shared_memory(2**16), pytest.raises(UnavailableError) as raised:
        list(read_batches(batches, 9, BatchReader((64, 64)), 1))
    assert REMEDY in only_line(raised.value)


@pytest.mark.parametrize(
    "read", [end_quietly, *(partial(end_by, number) for number in (signal.SIGKILL, signal.SIGBUS, signal.SIGSEGV))]
)
def test_a_process_that_ends_ends_the_reading(
    read: Callable[[], dict[str, object]], monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    # PyTorch looks for processes that have ended by themselves every 5 s.
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.5,))
    with ReaderPool(2) as readers, pytest.raises(RuntimeError) as raised:
        list(readers.read([[item], [read], [item], [item]]))
    line = only_line(raised.value)
    assert line.startswith("a process that reads images was killed") and REMEDY in line
    assert "Traceback" not in capfd.readouterr().err


def large() -> dict[str, object]:
    return {"image": bytes(2**20), "process": os.getpid()}


def killed_while_it_reads(processes: "multiprocessing.Queue[list[int]]") -> None:
    with ReaderPool(2) as readers:
        batches = readers.read([[large]] * 100, encoded=True)
        processes.put([int(next(batches)["process"]) for _ in range(2)])
        # Both processes have more to hand over by then.
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)


def test_processes_end_when_the_one_that_they_read_for_is_killed() -> None:
    processes: multiprocessing.Queue[list[int]] = CONTEXT.Queue()
    process = CONTEXT.Process(target=killed_while_it_reads, args=(processes,))
    process.start()
    left = set(processes.get(timeout=60))
    assert len(left) == 2
    process.join(60)
    until = time.monotonic() + 30
    while left and time.monotonic() < until:
        left = {pid for pid in left if runs(pid)}
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class FromAProcessThatEnded:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __reduce__(self) -> tuple[Callable[[Exception], None], tuple[Exception]]:
        return fetched_in_vain, (self.error,)


def fetched_in_vain(error: Exception) -> None:
    raise error


def handed_over(error: Exception) -> dict[str, object]:
    return {"image": FromAProcessThatEnded(error), "process": os.getpid()}


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "Connection reset by peer"), FileNotFoundError(2, "No such file"), EOFError()]
)
def test_a_process_that_ends_before_its_batch_is_fetched_ends_the_reading(error: Exception, capfd) -> None:
    with ReaderPool(1) as readers, pytest.raises(RuntimeError) as raised:
        list(readers.read([[partial(handed_over, error)]], encoded=True))
    line = only_line(raised.value)
    assert line.startswith("a process that reads images was killed") and REMEDY in line
    assert "Traceback" not in capfd.readouterr().err


def test_the_end_of_processes_prints_nothing(capfd) -> None:
    for status in (1, 3) * 4:
        with ReaderPool(2) as readers, pytest.raises(RuntimeError):
            list(readers.read([[item], [item], [partial(os._exit, status)], [item], [item]]))
    assert capfd.readouterr().err == ""


def test_a_task_that_a_process_cannot_unpickle_ends_the_reading(capfd) -> None:
    with ReaderPool(1) as readers, pytest.raises(UnavailableError) as raised:
        list(readers.read([[item], [Unreadable()]]))
    assert "No module named 'gone'" in only_line(raised.value)
    assert "Traceback" not in capfd.readouterr().err


def test_a_result_that_a_process_cannot_pickle_ends_the_reading(capfd) -> None:
    with ReaderPool(1) as readers, pytest.raises(UnavailableError) as raised:
        list(readers.read([[not_picklable]], encoded=True))
    assert "Too many open files" in only_line(raised.value)
    assert "Traceback" not in capfd.readouterr().err


def test_processes_that_cannot_start_are_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_processes(process: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("multiprocessing.context.Process._Popen", staticmethod(no_processes))
    with ReaderPool(1) as readers, pytest.raises(UnavailableError) as raised:
        list(readers.read([[item]]))
    line = only_line(raised.value)
    assert "cannot start ([Errno 11] Resource temporarily unavailable)" in line and REMEDY in line


@pytest.mark.parametrize("before", [0, 2], ids=["while it reads", "when it has read"])
def test_a_process_that_is_stopped_ends_the_reading(before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead_loader, "STUCK_SECONDS", 1.0)
    begin = time.monotonic()
    with ReaderPool(1) as readers, pytest.raises(UnavailableError) as raised:
        list(readers.read([[item]] * before + [[partial(end_by, signal.SIGSTOP)]] + [[item]]))
    assert "hang: none was read for 1 s" in only_line(raised.value)
    assert time.monotonic() - begin < 10


def too_large() -> dict[str, object]:
    return {"image": np.empty((2**40, 2**10))}


def test_a_process_whose_memory_runs_out_ends_the_reading() -> None:
    with ReaderPool(1) as readers, pytest.raises(RuntimeError) as raised:
        list(readers.read([[too_large]]))
    assert only_line(raised.value).startswith("memory ran out; give a smaller batch")


def slow() -> dict[str, object]:
    time.sleep(0.3)
    return item()


def test_a_large_batch_is_not_stuck_while_its_images_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead_loader, "STUCK_SECONDS", 0.8)
    with ReaderPool(1) as readers:
        assert len(list(readers.read([[slow] * 4]))) == 1


def test_a_caller_that_takes_its_time_is_not_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead_loader, "STUCK_SECONDS", 0.5)
    with ReaderPool(1) as readers:
        for _ in readers.read([[item]] * 2):
            time.sleep(1)


def test_after_a_fault_other_processes_read_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead_loader, "STUCK_SECONDS", 1.0)
    with ReaderPool(1) as readers:
        with pytest.raises(UnavailableError):
            list(readers.read([[partial(end_by, signal.SIGSTOP)]]))
        assert len(list(readers.read([[item]] * 3))) == 3
