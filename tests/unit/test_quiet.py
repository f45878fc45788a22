"""Warnings that are silenced in one thread are heard in others, and the process's settings are left as they were."""

import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastmsflow import MSFlow
from fastmsflow.quiet import Kind, QuietThread, errors_alone
from tests.helpers.tiny_model import tiny_model


@pytest.fixture(autouse=True)
def often_switched() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def is_heard(message: str = "heard", category: type[Warning] = UserWarning) -> bool:
    try:
        warnings.warn(message, category, stacklevel=1)
    except Warning:
        return True
    return False


def test_a_thread_is_silent_while_it_is_inside_and_others_are_heard() -> None:
    quiet, first_in, may_leave = QuietThread(), threading.Event(), threading.Event()

    def first() -> bool:
        with quiet:
            first_in.set()
            assert may_leave.wait(10)
            return is_heard()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        with ThreadPoolExecutor(1) as threads:
            done = threads.submit(first)
            assert first_in.wait(10)
            assert is_heard()
            # It came later and leaves earlier; the other one is still inside.
            with pytest.raises(KeyError), quiet, quiet:
                assert not is_heard()
                raise KeyError
            assert is_heard()
            may_leave.set()
            assert not done.result()
        assert warnings.filters == before
        assert is_heard()


def test_filters_that_a_caller_sets_inside_or_around_are_kept() -> None:
    quiet = QuietThread()
    outside = list(warnings.filters)
    with warnings.catch_warnings():
        quiet.__enter__()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert is_heard()
            with quiet:
                assert not is_heard()
            inner = [entry for entry in warnings.filters if entry not in quiet._filters]
        # The caller's block began before the first one of ours and ends within it.
    quiet.__exit__(None, None, None)
    assert inner[0][0] == "error"
    assert warnings.filters == outside


def test_blocks_of_many_threads_and_of_callers_leave_the_filters_as_they_were() -> None:
    quiet = QuietThread()
    stop = threading.Event()
    before = list(warnings.filters)

    def silent(_: int) -> bool:
        for _ in range(50):
            with quiet:
                if is_heard():
                    return False
        return True

    def caller() -> None:
        while not stop.is_set():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)

    with ThreadPoolExecutor(5) as threads:
        others = threads.submit(caller)
        assert all(threads.map(silent, range(20)))
        stop.set()
        others.result()
    assert warnings.filters == before


def test_only_the_kinds_that_are_named_are_silent() -> None:
    quiet = QuietThread(Kind("a .*b"), Kind(category=FutureWarning), Kind(module="nowhere"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with quiet:
            assert not is_heard("A and b")
            assert not is_heard(category=FutureWarning)
            assert is_heard("b")
            assert is_heard(category=DeprecationWarning)


def test_a_logger_has_its_level_again() -> None:
    logger = logging.getLogger("tests.quiet")
    logger.setLevel(logging.INFO)
    with pytest.raises(KeyError), errors_alone("tests.quiet"):
        assert not logger.isEnabledFor(logging.WARNING)
        raise KeyError
    assert logger.level == logging.INFO


def test_models_made_for_inference_in_threads_leave_the_threads_and_random_numbers_of_the_caller() -> None:
    before, random = torch.get_num_threads(), torch.get_rng_state()
    models = [tiny_model().eval() for _ in range(4)]
    torch.set_rng_state(random)

    def made(model: MSFlow) -> int:
        torch.set_num_threads(2)
        model.for_inference()
        return torch.get_num_threads()

    try:
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(made, models)) == [2] * 4
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.get_rng_state(), random)
