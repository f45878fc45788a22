"""Has processes read batches ahead, by PyTorch's DataLoader. If such a process ends, fails or hangs, that is one error.

PyTorch alone waits for ever where what a process read cannot be handed over, or a process is stopped.
"""

import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from multiprocessing.sharedctypes import RawValue
from threading import Event, Thread
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import WITHOUT_READERS, UnavailableError, is_meant_for_a_person, is_of_a_killed_reader

STUCK_SECONDS = 600.0
"""The time after which processes count as stuck. Until then, any image or part of a shard that is read shows life."""
CHECK_SECONDS = 5.0
PARENT_CHECK_SECONDS = 1.0

# A process that reads notes the time of its last sign of life there, one place for all of them.
_last_sign: Any = None


class AheadLoader(AbstractContextManager["AheadLoader"]):
    """Iterates over the batches of ``dataset``, read ahead by ``workers`` processes, or by this process if 0.

    ``collate`` and ``options``: see PyTorch's DataLoader. The processes end with the block, or with the first error.
    Raises: the errors of reading; RuntimeError, see fastmsflow.errors.in_one_line, if a process is killed or exits;
    UnavailableError if processes cannot start or hand over what they read, or none shows life for STUCK_SECONDS.
    """

    def __init__(self, dataset: Dataset[Any], workers: int, collate: Callable[[Any], Any], **options: Any) -> None:
        self._waiting_since: float | None = None
        self._stuck = False
        self._ended = Event()
        self._processes: list[BaseProcess] = []
        self._last_sign = None
        if workers:
            with _faults_of_start():
                self._last_sign = RawValue("d")
                # A DataLoader that cannot have its own queues prints a second error where it ends.
                multiprocessing.Queue().close()
        self._loader: DataLoader[Any] | None = DataLoader(
            dataset,
            num_workers=workers,
            collate_fn=partial(_collated, collate) if workers else collate,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=partial(_begin, self._last_sign),
            **options,
        )
        if workers:
            Thread(target=self._watch, daemon=True).start()

    def __iter__(self) -> Iterator[Any]:
        assert self._loader is not None
        results: Iterator[Any] | None = None
        while True:
            self._waiting_since = time.monotonic()
            try:
                results = self._start(self._loader) if results is None else results
                batch = next(results)
            except StopIteration:
                return
            except BaseException as error:  # Ctrl-C too
                # torch's frames would hold the processes, and each would take 5 s to end as garbage.
                error.__traceback__ = error.__cause__ = error.__context__ = None
                fault = self._fault(error) if isinstance(error, Exception) else error
            else:
                self._waiting_since = None
                yield batch
                continue
            finally:
                self._waiting_since = None
            break
        if isinstance(fault, Exception) and is_of_a_killed_reader(fault):
            self._reap()
        results = None
        self.end()
        raise fault

    def _reap(self) -> None:
        """Ends all processes here: PyTorch's signal handler would raise where it ends them, and print a traceback."""
        for process in self._processes:
            while process.is_alive():
                with suppress(RuntimeError):
                    process.kill()
                    process.join()

    def end(self) -> None:
        """Ends the processes, whatever they are doing."""
        self._ended.set()
        self._loader = None
        for process in self._processes:
            # One that hangs did not heed PyTorch; at its exit Python would wait for it.
            if process.is_alive():
                process.kill()
        self._processes = []

    def __exit__(self, *error: object) -> None:
        self.end()

    def _start(self, loader: "DataLoader[Any]") -> Iterator[Any]:
        before = multiprocessing.active_children()
        try:
            with _faults_of_start():
                return iter(loader)
        finally:
            self._processes += [process for process in multiprocessing.active_children() if process not in before]

    def _watch(self) -> None:
        """Kills processes that are stuck, which ends any wait for them, also one for what they hand over."""
        assert self._last_sign is not None
        while not self._ended.wait(min(CHECK_SECONDS, STUCK_SECONDS)):
            since = self._waiting_since
            if since is not None and time.monotonic() - max(since, self._last_sign.value) > STUCK_SECONDS:
                self._stuck = True
                for process in self._processes:
                    process.kill()
                return

    def _fault(self, error: Exception) -> Exception:
        if self._stuck:
            return UnavailableError(
                f"the processes that read images hang: none was read for {STUCK_SECONDS:g} s; look whether the disk"
                " answers, and give --workers 0"
            )
        text = str(error)
        if self._processes and isinstance(error, NO_SENDER) and not text.startswith("Caught"):
            return RuntimeError(f"DataLoader worker ended before its batch was fetched ({error!r})")
        is_of_handover = isinstance(error, (OSError, RuntimeError)) and not isinstance(error, UnavailableError)
        if is_of_handover and any(sign in text for sign in NO_HANDOVER):
            return _not_handed_over(text)
        return error


class Requests(Dataset[Any]):
    """Gives ``dataset`` requests that were pickled before they are sent, by ``pickled``.

    A request that PyTorch itself cannot unpickle ends the process with a traceback.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset

    def __getitem__(self, request: bytes) -> Any:
        try:
            opened = pickle.loads(request)
        except Exception as error:  # whatever a request's modules raise
            raise UnavailableError(
                f"a process that reads images cannot take its task ({type(error).__name__}: {error}); {WITHOUT_READERS}"
            ) from error
        return self._dataset[opened]


def pickled(request: object) -> bytes:
    """Returns a request as ``Requests`` takes it."""
    return bytes(ForkingPickler.dumps(request))


def show_life() -> None:
    """Tells the process that waits, if this one reads for another, that something was read."""
    if _last_sign is not None:
        _last_sign.value = time.monotonic()


class _Result:
    """A result that is pickled where it is made: PyTorch prints what fails while it sends, and goes on."""

    def __init__(self, result: object) -> None:
        try:
            self._content = pickled(result)
        except UnavailableError:
            raise
        except (OSError, RuntimeError) as error:
            raise _not_handed_over(str(error)) from error

    def __reduce__(self) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
        return pickle.loads, (self._content,)


def _collated(collate: Callable[[Any], Any], items: Any) -> _Result:
    return _Result(collate(items))


# torch and Python say this where memory that processes share, or open files to pass it on by, are lacking.
NO_HANDOVER = ("/torch_", "shared memory", "ancdata", "Too many open files")


# These are raised here if a process that reads ended before its tensors were fetched.
NO_SENDER = (ConnectionError, EOFError, FileNotFoundError)


def _not_handed_over(why: str) -> UnavailableError:
    # An error of another process has its traceback in front.
    reason = why.strip().splitlines()[-1].removeprefix("RuntimeError: ")
    return UnavailableError(
        f"processes that read images cannot hand them over ({reason}); the shared memory, /dev/shm, is most often too"
        f" small: {WITHOUT_READERS}"
    )


@contextmanager
def _faults_of_start() -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError) and is_meant_for_a_person(error):
            raise
        raise UnavailableError(f"processes that read images cannot start ({error}); {WITHOUT_READERS}") from error


def _begin(last_sign: Any, worker: int) -> None:
    """Starts a worker that outlives the Ctrl-C or SIGTERM which all processes get: the main process ends it. A training
    still needs batches, to end with a whole step. A SIGTERM of the main process ends the worker, since at its exit that
    process waits for it; so does that process's death, after which the worker would wait for ever to hand over."""
    global _last_sign
    _last_sign = last_sign
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent, started_by = multiprocessing.parent_process(), os.getppid()
    assert parent is not None
    # A fork server outlives the parent; processes that the parent has forked hold its sentinel.
    while parent.is_alive() and os.getppid() == started_by:
        found = signal.sigtimedwait({signal.SIGTERM}, PARENT_CHECK_SECONDS)
        if found is not None and found.si_pid == parent.pid:
            break
    os._exit(0)
